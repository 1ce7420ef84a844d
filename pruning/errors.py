"""Exceptions of this package."""


class PruningError(ValueError):
    """A request or an input that can't be used; the message names it, its value and what would be right."""


class DoesNotFitError(PruningError):
    """There is less memory or disk here than the work takes; a dry run says so and goes on."""
