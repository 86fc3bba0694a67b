"""Our hooks on kept tensors taken off where none may be, inside torch.func."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from invact.pytorch.saved_tensor_hooks import hooks_taken_off, torch_graph
from invact.simulation.replaced_attributes import replaced


@contextmanager
def hooks_standing_aside(ours: Callable[[Any], bool], count: list[int]) -> Iterator[None]:
    """Counts where this thread can have no hooks on kept tensors, inside torch.func, and takes those of ours off there.

    Args:
        ours: told by the function that packs.
    """
    thread = threading.get_ident()
    stock = torch_graph.disable_saved_tensors_hooks

    @contextmanager
    def set_aside(message: str) -> Iterator[None]:
        if threading.get_ident() != thread:
            with stock(message):
                yield
            return
        count[0] += 1
        with hooks_taken_off(ours), stock(message):
            yield

    with replaced(torch_graph, "disable_saved_tensors_hooks", set_aside):
        yield
