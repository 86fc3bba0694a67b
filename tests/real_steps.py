"""The most bytes that live in real training steps on the CPU: counted apart from `invact.fitting`."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-4),
    "none": lambda parameters: None,
}


class LivingBytes(TorchDispatchMode):
    """Adds each storage's bytes when an operation first gives it, takes them off when nobody holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.living: dict[int, int] = {}
        self.now = self.highest = 0

    def add(self, *values: Any) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.living:
                    self.living[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.highest = max(self.highest, self.now)

    def _gone(self, storage: int) -> None:
        self.now -= self.living.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self.add(given)
        return given


def loss_of(model: nn.Module, inputs: Any) -> torch.Tensor:
    """The model's own, or the sum of all that takes a gradient."""
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    given = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]
    total = given[0].sum()
    for tensor in given[1:]:
        total = total + tensor.sum()
    return total


def counted_peak(
    model: nn.Module,
    inputs: Any,
    optimizer: str | torch.optim.Optimizer = "adamw",
    autocast: torch.dtype | None = None,
    accumulating: bool = False,
) -> tuple[int, int]:
    """The most bytes that live in a step that is not the first, and those that forward leaves for backward.

    The latter are without weights, optimizer states, gradients and inputs. The model is trained by this.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if isinstance(optimizer, str):
        optimizer = OPTIMIZERS[optimizer](parameters)
    counted = LivingBytes()
    counted.add(list(model.parameters()), list(model.buffers()), inputs)
    kept = 0
    with counted:
        for step in range(2):
            for _ in range(2 if accumulating else 1):  # the last one is what is told of
                counted.highest = before = counted.now
                with torch.autocast("cpu", autocast) if autocast else nullcontext():
                    loss = loss_of(model, inputs)
                kept = counted.now - before
                loss.backward()
                del loss
            if optimizer is not None:
                optimizer.step()
            if step == 0:
                model.zero_grad()
    model.zero_grad()
    return counted.highest, kept
