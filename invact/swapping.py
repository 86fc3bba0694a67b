"""The module that stands where an activation stood, and how it is put there and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invact import functional
from invact.kernels import CURVES

_SHARED = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class Inverted(nn.Module):
    """Stands where `original` stood, and keeps the output instead of the input for backward.

    In evaluation mode and without gradients it runs `original`, so that results there are exactly the same.
    It adds nothing to the state dict. Hooks of `original` go on being called, and their handles remove them.
    """

    def __init__(self, original: nn.Module, curve: str) -> None:
        super().__init__()
        self.curve = curve
        # Not as a submodule: the model's names, state dict and children stay what they were.
        self.__dict__["original"] = original
        self.training = original.training
        for name in _SHARED:
            self.__dict__[name] = original.__dict__[name]

    original: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and x.requires_grad:
            return functional.invert(x, CURVES[self.curve])
        return self.original.forward(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.curve}, was {self.original!r}"


@dataclass(frozen=True)
class Swap:
    """One name in one parent at which `original` was replaced."""

    parent: nn.Module
    name: str
    original: nn.Module


def swap_in(model: nn.Module, curves: Mapping[str, str]) -> list[Swap]:
    """Replaces the module at each path by an `Inverted` one, wherever it is registered; all of them or none."""
    originals = {path: model.get_submodule(path) for path in curves}
    inverted = {id(original): Inverted(original, curves[path]) for path, original in originals.items()}
    swaps = [Swap(parent, name, child) for parent, name, child in _places(model) if id(child) in inverted]
    try:
        for swap in swaps:
            setattr(swap.parent, swap.name, inverted[id(swap.original)])
    except BaseException:
        swap_out(swaps)
        raise
    return swaps


def swap_out(swaps: Iterable[Swap]) -> int:
    """Puts the originals back; returns how many modules that were."""
    restored = set()
    for swap in swaps:
        present = swap.parent._modules[swap.name]
        if present is not None and present is not swap.original:
            swap.original.training = present.training
            swap.parent._modules[swap.name] = swap.original
            restored.add(id(swap.original))
    return len(restored)


def swaps_in(model: nn.Module) -> list[Swap]:
    """Every place of `model` where an `Inverted` module stands."""
    return [Swap(parent, name, child.original) for parent, name, child in _places(model) if isinstance(child, Inverted)]


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
