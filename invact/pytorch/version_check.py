"""What is said where this PyTorch has not a name of its inside that invact leans on.

Each other file of this folder asks here, when it is imported: nothing goes on with a guess.
"""

from __future__ import annotations

from typing import Any

import torch

RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def names_missing(what: object) -> ImportError:
    return ImportError(
        f"invact leans on names inside PyTorch that PyTorch {torch.__version__} does not have: {what}. Install a newer "
        "invact, or a PyTorch between 2.8 and 2.14, with which this one was tried."
    )


def found(owner: Any, name: str) -> Any:
    """`owner.name`, or the one sentence where this PyTorch does not have it."""
    try:
        return getattr(owner, name)
    except AttributeError as error:
        raise names_missing(f"{getattr(owner, '__name__', owner)}.{name}") from error
