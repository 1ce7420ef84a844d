"""What all packages have in common. The version is here; an installed package's metadata are made of it
(pyproject.toml)."""

__version__ = "0.1.0"


def how_to_install(extra: str) -> str:
    """The command for an optional extra. It takes a checkout: Lowkey is on no package index, and what somebody else may
    register there under its name must not be installed."""
    return f"pip install -e '.[{extra}]' in a checkout of Lowkey"
