"""PyTorch's work on the CPU in one thread, where it is many small pieces.

Each piece of more than some thousand numbers would wait for a second core, and a machine that has other work gives none
for milliseconds: to recognise a norm of width 4096 took 4 s of two cores then, and takes 0.2 s of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def in_one_thread() -> Iterator[None]:
    """In the block PyTorch's operators on the CPU run in the thread that calls them.

    Example:
        >>> with in_one_thread():
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
