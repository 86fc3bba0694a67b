"""What stands where an activation stood, and how it is put there and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from invact import functional
from invact.expressions import Written, install, runners_in, uninstall
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
        if self.training and _needs_gradient(x):
            return functional.invert(x, CURVES[self.curve])
        return self.original.forward(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.curve}, was {self.original!r}"


@dataclass(frozen=True)
class InvertedExpression:
    """Runs in an expression's place; see `invact.expressions`. `Inverted` for what is no module."""

    curve: str

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if module.training and _needs_gradient(x):
            return functional.invert(x, CURVES[self.curve])
        return original(x)


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


@dataclass
class Swaps:
    """What `swap_in` replaced, so that exactly that can be put back."""

    modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)  # parent, name, original
    methods: list[nn.Module] = field(default_factory=list)

    def undo(self) -> int:
        """Puts everything back; returns the number of sites restored."""
        restored = set()
        for parent, name, original in self.modules:
            inverted = parent._modules[name]
            if isinstance(inverted, Inverted):
                original.training = inverted.training
                parent._modules[name] = original
                restored.add(id(original))
        return len(restored) + sum(uninstall(module) for module in self.methods)


def swap_in(
    model: nn.Module, curves: Mapping[str, str], written: Mapping[str, Mapping[Written, str]] | None = None
) -> Swaps:
    """Replaces modules and expressions by inverted ones; all of them or, after an error, none.

    Args:
        curves: the curve by the path of the module; replaced wherever that module is registered.
        written: by the path of a module, the curves of the expressions in its methods.
    """
    originals = {path: model.get_submodule(path) for path in curves}
    inverted = {id(original): Inverted(original, curves[path]) for path, original in originals.items()}
    places = [(parent, name, child) for parent, name, child in _places(model) if id(child) in inverted]
    swaps = Swaps(places)
    try:
        for parent, name, original in places:
            setattr(parent, name, inverted[id(original)])
        for path, chosen in (written or {}).items():
            module = model.get_submodule(path)
            swaps.methods.append(module)
            install(module, {expression: InvertedExpression(curve) for expression, curve in chosen.items()})
    except BaseException:
        swaps.undo()
        raise
    return swaps


def swaps_in(model: nn.Module) -> Swaps:
    """Everything inverted in `model`."""
    places = [(parent, name, child.original) for parent, name, child in _places(model) if isinstance(child, Inverted)]
    return Swaps(places, [module for module in model.modules() if runners_in(module)])


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
