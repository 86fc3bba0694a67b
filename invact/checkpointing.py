"""Gradient checkpointing switched on and off by each library's own switch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def can_checkpoint(model: nn.Module) -> bool:
    """Whether the model has a switch for gradient checkpointing, and it works."""
    try:
        with checkpointed(model):
            return True
    except (AssertionError, AttributeError, NotImplementedError, ValueError):  # as the libraries refuse
        return False


def enable_checkpointing(model: Any) -> None:
    """Recompute the model's blocks in backward, by PyTorch's checkpointing without reentrance."""
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif hasattr(model, "gradient_checkpointing_enable"):  # transformers 4
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:  # timm, OpenCLIP
        model.set_grad_checkpointing(True)


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """`enable_checkpointing` for the length of a block."""
    enable_checkpointing(model)
    try:
        yield
    finally:
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        elif hasattr(model, "gradient_checkpointing_disable"):
            model.gradient_checkpointing_disable()
        else:
            model.set_grad_checkpointing(False)
