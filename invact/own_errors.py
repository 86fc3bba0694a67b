"""Whose fault an error is: the user's model's, or ours."""

from __future__ import annotations

import traceback
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


_OF_MODES = ("__torch_dispatch__", "__torch_function__")


def raised_by_invact(error: BaseException) -> bool:
    """Whether code of this package raised it, rather than the model or PyTorch that were called from here.

    The modes of `simulation` do not count: what they raise, they raise in the stead of the operations they imitate.
    """
    places = [
        (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    places = [place for place in places if place[1] not in ("__torch_dispatch__", "__torch_function__")]
    return bool(places) and places[-1][0].partition(".")[0] == __name__.partition(".")[0]


def first_line(error: Exception) -> str:
    """Of the message, without a full stop; the kind of the error where there is no message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
