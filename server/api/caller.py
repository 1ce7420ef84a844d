"""Who sends a request, and what that allows. Authentication, where there is any, has left it in `request.state`."""

from fastapi import Request


def owner_of(request: Request) -> str:
    """The name of the API key; one name for all where no key is asked for."""
    owner: str = getattr(request.state, "owner", "")
    return owner


def priority_of(request: Request, asked: int | None) -> int:
    """The priority asked for, raised to the most urgent (lowest) one that the key may have."""
    return max(asked or 0, getattr(request.state, "max_priority", 0))
