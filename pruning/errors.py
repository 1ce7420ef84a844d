"""The one exception of this package."""


class PruningError(ValueError):
    """A request or an input that can't be used; the message names it, its value and what would be right."""
