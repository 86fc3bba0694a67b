"""What torch.compile reads and sets: whether it is at work, and what it takes for constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from invact.pytorch.version_check import found

Function = TypeVar("Function", bound=Callable[..., Any])

found(torch.compiler, "_is_compiling_flag")


def constant_when_compiled(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import the compiler: a graph holds what the function returns.

    Without it a function that is cached is traced line by line, and the graph breaks there.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def as_if_compiling() -> Iterator[None]:
    """torch.compiler.is_compiling() is true: models that ask build masks, say, that they leave out elsewhere.

    PyTorch has one such flag for all threads, and sets it itself while it compiles.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before
