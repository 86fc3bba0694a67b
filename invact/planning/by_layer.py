"""What is kept for backward by layer of the model, before patching and after."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from invact.errors.checks import Inputs
from invact.planning.plans import Decided
from invact.probing.probe import observe
from invact.simulation.setting import Setting


@dataclass
class Layer:
    """Bytes by the class of the module that keeps them, in one numbered layer or one unnumbered part."""

    name: str
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)


def memory_by_layer(model: nn.Module, inputs: Inputs, setting: Setting, decided: Decided) -> list[Layer]:
    """The layers that keep anything, in the order of the forward pass."""
    before = observe(model, inputs, setting)
    after = decided.observed(model, inputs)
    layers: dict[str, Layer] = {}
    for observation, side in ((before, "before"), (after, "after")):
        for path, nbytes in observation.memory.by_module.items():
            name = layer_name(path)
            by_class = getattr(layers.setdefault(name, Layer(name)), side)
            label = observation.labels[path]
            by_class[label] = by_class.get(label, 0) + nbytes
    return list(layers.values())


def layer_name(path: str) -> str:
    """As far as the first number: "encoder.layer.3" of "encoder.layer.3.output.dense"; else the first part.

    Example:
        >>> layer_name("encoder.layer.3.output.dense"), layer_name("head.dense"), layer_name("")
        ('encoder.layer.3', 'head', 'the model itself')
    """
    parts = path.split(".")
    numbers = [depth for depth, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:1]) or "the model itself"
