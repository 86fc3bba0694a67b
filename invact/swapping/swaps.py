"""Puts into a model what was decided, all of it or, after an error, nothing; and takes it out again."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from invact.recognition.fused_rms_norm import Fusion
from invact.recognition.rewriting import Runner
from invact.recognition.written_expression import Written
from invact.swapping.activations import activation_class
from invact.swapping.approximation import Approximation
from invact.swapping.checkpointed import checkpointed_class, switched_class, with_a_switch_around
from invact.swapping.class_over import class_without
from invact.swapping.derived import deriving_class
from invact.swapping.fused_norms import fused_class
from invact.swapping.inversion import Inversion
from invact.swapping.patched import Patched, set_class
from invact.swapping.rewritten import rewritten_class


@dataclass
class Swaps:
    """The modules that `swap_in` patched, each with the class it was given, so that exactly these are taken back."""

    modules: list[tuple[nn.Module, type[Patched]]] = field(default_factory=list)

    def undo(self) -> int:
        """Takes every class of ours off again; returns the number of sites restored."""
        restored = 0
        for module, kind in reversed(self.modules):
            if issubclass(type(module), kind):
                restored += len(kind._invact_sites) - len(getattr(kind._invact_below, "_invact_sites", ()))
                set_class(module, class_without(type(module), kind))
        self.modules = []
        return restored


def swap_in(
    model: nn.Module,
    modules: Mapping[str, Inversion | Approximation],
    expressions: Mapping[str, Mapping[Written, Runner]],
    derives: Mapping[str, bool] = types.MappingProxyType({}),
    norms: Mapping[str, Fusion] = types.MappingProxyType({}),
    checkpointed: Sequence[str] = (),
) -> Swaps:
    """Inverts or approximates, fuses norms, sets hooks, and checkpoints; all of it or, after an error, nothing.

    Args:
        modules: by the path of the module.
        expressions: by the path of the module in whose methods they stand, what runs in their place.
        derives: by the path of the module, whether tensors are derived inside it.
        norms: by the path of the module.
        checkpointed: the paths of blocks.
    """
    swaps = Swaps()
    try:
        for path, how in modules.items():
            module = model.get_submodule(path)
            _swap(module, activation_class(type(module), how), swaps)
        for path, fusion in norms.items():
            module = model.get_submodule(path)
            _swap(module, fused_class(type(module), fusion), swaps)
        for path, runners in expressions.items():
            module = model.get_submodule(path)
            _swap(module, rewritten_class(type(module), runners), swaps)
        for path, allowed in derives.items():
            module = model.get_submodule(path)
            _swap(module, deriving_class(type(module), allowed, "forward" in vars(module)), swaps)
        for path in checkpointed:
            module = model.get_submodule(path)
            _swap(module, checkpointed_class(type(module), "forward" in vars(module)), swaps)
        for module in with_a_switch_around(model, checkpointed):
            _swap(module, switched_class(type(module)), swaps)
    except BaseException:
        swaps.undo()
        raise
    return swaps


def _swap(module: nn.Module, kind: type, swaps: Swaps) -> None:
    set_class(module, kind)
    swaps.modules.append((module, kind))


def swaps_in(model: nn.Module) -> Swaps:
    """Everything patched in `model`."""
    ours = [(module, kind) for module in model.modules() for kind in reversed(type(module).__mro__)]
    return Swaps([(module, kind) for module, kind in ours if "_invact_below" in vars(kind)])
