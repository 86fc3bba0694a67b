"""Regions under torch.utils.checkpoint: counted, and run as ordinary code where that is asked for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint as torch_checkpoint

from invact.pytorch.checkpointing import CheckpointFunction, checkpoint_generator
from invact.simulation.replaced_attributes import replaced


@contextmanager
def checkpoints_counted(count: list[int], *, run_them: bool) -> Iterator[None]:
    """Counts this thread's regions under torch.utils.checkpoint; runs them as ordinary code unless `run_them`.

    PyTorch has no way to be told of a region, so its two ways to run one are wrapped for the length of the block.
    What another library puts over ours meanwhile stays, and finds what was there before us underneath.
    """
    thread = threading.get_ident()
    over = False
    name = checkpoint_generator()
    generator, apply = getattr(torch_checkpoint, name), CheckpointFunction.apply

    def is_ours() -> bool:
        return threading.get_ident() == thread and not over

    def counted_apply(function: Any, preserve: bool, *args: Any) -> Any:
        if is_ours():
            count[0] += 1
        return function(*args) if is_ours() and not run_them else apply(function, preserve, *args)

    def counted_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        if is_ours():
            count[0] += 1
        if is_ours() and not run_them:
            yield
        else:
            yield from generator(*args, **kwargs)

    with (
        replaced(torch_checkpoint, name, counted_generator),
        replaced(CheckpointFunction, "apply", staticmethod(counted_apply)),
    ):
        try:
            yield
        finally:
            over = True
