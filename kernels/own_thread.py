"""Work that nothing around it can change: in a thread of its own, which starts without anybody's modes.

A table is made where it is first needed, and that may be under a `FakeTensorMode`, in inference mode, inside a
`torch.func` transform, under a default device or a mode of a user's; and then it is kept for the whole program. PyTorch
has all of these per thread.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_own_thread(work: Callable[[], Result]) -> Result:
    """What `work` returns; what it raises is raised here."""
    with ThreadPoolExecutor(1, "invact-tables") as thread:
        return thread.submit(work).result()
