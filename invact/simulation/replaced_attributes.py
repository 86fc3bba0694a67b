"""An attribute of somebody else's, replaced for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, ours: Any) -> Iterator[None]:
    """Sets an attribute for the length of the block, and undoes that if nobody has set it since.

    Example:
        >>> import math
        >>> with replaced(math, "tau", 6):
        ...     math.tau
        6
        >>> math.tau > 6
        True
    """
    own = vars(owner)
    was_there, before = name in own, own.get(name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        if vars(owner).get(name) is ours:
            if was_there:
                setattr(owner, name, before)
            else:
                delattr(owner, name)
