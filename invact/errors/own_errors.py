"""Whose fault an error is: the user's model's, or ours."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


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


class ImitatedError(RuntimeError):
    """Raised in the stead of an operation that would refuse what the model gives it."""


def users_call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls the user's code, or an operation for it: what goes wrong in there is told as his; see below."""
    return function(*args, **kwargs)


def raised_by_invact(error: BaseException) -> bool:
    """Whether the fault is one of this package, rather than of the model or of PyTorch when it runs the model.

    Told by the innermost code that is not PyTorch's: somebody else's, or ours, which is at fault unless it was just
    `users_call`. A mode runs in the middle of an operation, whose caller counts.

    Example:
        >>> try:
        ...     users_call(int, "five")
        ... except ValueError as error:
        ...     raised_by_invact(error)
        False
    """
    if isinstance(error, ImitatedError):
        return False
    calling = False
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package == "torch":
            continue
        if package != __name__.partition(".")[0]:
            return False
        if frame.f_code is users_call.__code__:
            calling = True
        elif calling and frame.f_code.co_name in _OF_MODES:
            calling = False
        else:
            return not calling
    return False


_OF_MODES = ("__torch_dispatch__", "__torch_function__")


def first_line(error: Exception) -> str:
    """Of the message, without a full stop; the kind of the error where there is no message."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
