"""What stands where an activation stood, and how it is put there and taken out again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from invact import dropout, functional
from invact.kernels import Curve
from invact.rewriting import Written, install, runners_in, uninstall

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class Inversion:
    """How a site is inverted.

    Attributes:
        curve: what is computed there.
        in_place: the output takes the memory of the input.
        dropouts: the paths of the nn.Dropout modules that alone take the output, and are fused with it.
    """

    curve: Curve
    in_place: bool = False
    dropouts: frozenset[str] = frozenset()

    def __call__(self, x: Tensor) -> Tensor:
        if self.dropouts:
            return dropout.announced(x, self.curve)
        return functional.invert(x, self.curve, self.in_place)


class StandIn(nn.Module):
    """Stands where `original` stood.

    It adds nothing to the state dict. Hooks of `original` go on being called, and their handles remove them.
    A deepcopy stands in as well; a pickle holds `original`, so that a saved model does not need invact.
    """

    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: the model's names, state dict and children stay what they were.
        self.__dict__.update(original=original, training=original.training)
        _share_hooks(original, self)

    def restored(self) -> nn.Module:
        """`original`, with the mode and the hooks that it has been given meanwhile."""
        self.original.training = self.training
        _share_hooks(self, self.original)
        return self.original

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        twin = type(self).__new__(type(self))
        StandIn.__init__(twin, copy.deepcopy(self.restored(), memo))
        twin.__dict__.update({name: value for name, value in self.__dict__.items() if name not in twin.__dict__})
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.restored(),)


class Inverted(StandIn):
    """An activation that keeps its output instead of its input for backward.

    In evaluation mode and without gradients it runs `original`, so that results there are exactly the same.
    """

    inversion: Inversion

    def __init__(self, original: nn.Module, inversion: Inversion) -> None:
        super().__init__(original)
        self.__dict__["inversion"] = inversion

    def forward(self, x: Tensor) -> Tensor:
        if self.training and functional.wants_gradient(x):
            return self.inversion(x)
        return self.original.forward(x)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.inversion.curve}, was {self.original!r}"


class FusedDropout(StandIn):
    """The dropout that alone takes the output of an inverted activation; see `invact.dropout`."""

    original: nn.Dropout

    def forward(self, y: Tensor) -> Tensor:
        return dropout.dropped(y, self.original.p, self.training)

    def extra_repr(self) -> str:
        return f"was {self.original!r}"


def _itself(module: nn.Module) -> nn.Module:
    return module


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    target.__dict__.update({name: source.__dict__[name] for name in _HOOKS})


@dataclass(frozen=True)
class InvertedExpression:
    """Runs in an expression's place; see `invact.rewriting`. `Inverted` for what is no module."""

    inversion: Inversion

    def __call__(self, module: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if module.training and functional.wants_gradient(x):
            return self.inversion(x)
        return original(x)


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
            if isinstance(inverted, StandIn):
                parent._modules[name] = inverted.restored()
                if isinstance(inverted, Inverted):
                    restored.add(id(original))
        return len(restored) + sum(uninstall(module) for module in self.methods)


def swap_in(
    model: nn.Module,
    modules: Mapping[str, Inversion],
    expressions: Mapping[str, Mapping[Written, Inversion]],
) -> Swaps:
    """Replaces modules and expressions by inverted ones; all of them or, after an error, none.

    Args:
        modules: by the path of the module; replaced wherever that module is registered.
        expressions: by the path of the module in whose methods they stand.
    """
    stand_ins: dict[int, StandIn] = {}
    for path, inversion in modules.items():
        original = model.get_submodule(path)
        stand_ins[id(original)] = Inverted(original, inversion)
    inversions = [*modules.values(), *(i for chosen in expressions.values() for i in chosen.values())]
    for path in {path for inversion in inversions for path in inversion.dropouts}:
        original = model.get_submodule(path)
        stand_ins[id(original)] = FusedDropout(original)
    places = [(parent, name, child) for parent, name, child in _places(model) if id(child) in stand_ins]
    swaps = Swaps(places)
    try:
        for parent, name, original in places:
            setattr(parent, name, stand_ins[id(original)])
        for path, chosen in expressions.items():
            module = model.get_submodule(path)
            swaps.methods.append(module)
            install(module, {written: InvertedExpression(inversion) for written, inversion in chosen.items()})
    except BaseException:
        swaps.undo()
        raise
    return swaps


def swaps_in(model: nn.Module) -> Swaps:
    """Everything inverted in `model`."""
    places = [(parent, name, child.original) for parent, name, child in _places(model) if isinstance(child, StandIn)]
    return Swaps(places, [module for module in model.modules() if runners_in(module)])


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
