"""Models built as shapes only: parameters on the meta device, so size and initialisation cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Within it, modules make their parameters on the meta device and of the given dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)
