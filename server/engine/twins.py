"""Requests with the same prompt, of which one feeds it."""

from server.engine.request import Request, TwinKey


class Twins:
    """For each prompt that is being fed, the request that feeds it. Others with the same prompt (`Request.twin_key`)
    wait for its state instead of feeding the prompt again."""

    def __init__(self) -> None:
        self._feeding: dict[TwinKey, Request] = {}

    def __len__(self) -> int:
        return len(self._feeding)

    def feed(self, request: Request) -> None:
        """The request feeds its prompt, for its twins too if none of them does already."""
        if request.twin_key is not None:
            self._feeding.setdefault(request.twin_key, request)

    def wait_for_another(self, request: Request) -> bool:
        """Whether a request that goes before this one is feeding the same prompt."""
        other = None if request.twin_key is None else self._feeding.get(request.twin_key)
        return other is not None and other.order < request.order

    def fed(self, request: Request) -> bool:
        """Let nobody wait for this request any more. Returns whether somebody might have."""
        if request.twin_key is None or self._feeding.get(request.twin_key) is not request:
            return False
        del self._feeding[request.twin_key]
        return True
