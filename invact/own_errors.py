"""Whose fault an error is: the user's model's, or ours."""

from __future__ import annotations

from collections.abc import Callable


def own_error(call: Callable[[], object]) -> Exception | None:
    """What the model's own call raises with nothing of invact around it; None if it runs.

    Asked after something has failed: only where the model fails by itself is its error told as bad input, and
    without a traceback.

    Example:
        >>> own_error(lambda: int("five"))
        ValueError("invalid literal for int() with base 10: 'five'")
    """
    try:
        call()
    except Exception as error:
        return error
    return None


def first_line(error: Exception) -> str:
    """Of the message, without a full stop; the kind of the error where there is no message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
