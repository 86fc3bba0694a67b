"""What an inverted activation is timed against: the stock one, the compiler's, and what others have published.

A new contender is one entry in `PUBLISHED`: a package that someone may have installed, and which of its functions
computes which curve. Only those are listed that take one tensor and compute the same function of it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invact.inverting.autograd_functions import invert
from invact.kernels import CURVES

STOCK, INVACT, COMPILE, CHECKPOINTING = "stock", "invact", "compile", "checkpointing"

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Published:
    """Somebody else's activations that keep less for backward than stock ones, or did when they were published.

    Attributes:
        name: of the package, as it is imported.
        module: where the functions are.
        functions: their names, by the curve that they compute.
    """

    name: str
    module: str
    functions: dict[str, str]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.name) is not None

    def activation(self, curve: str) -> Activation:
        """Raises whatever the package raises when it is imported."""
        function: Activation = getattr(importlib.import_module(self.module), self.functions[curve])
        return function


PUBLISHED = (
    # Novikov & Oseledets, arXiv 2407.15545v2, github.com/PgLoLo/optiacts: y and one bit per element.
    Published(
        name="optiacts",
        module="optiacts",
        functions={"gelu": "gelu", "silu": "silu"},
    ),
    # Novikov et al., arXiv 2202.00441, github.com/skolai/fewbit: which of eight values f' has.
    Published(
        name="fewbit",
        module="fewbit.functional",
        functions={name: name for name in ("gelu", "silu", "mish", "hardswish")},
    ),
    # R. Wightman, PyTorch Image Models: keeps x alone, where the formula written out keeps more.
    Published(
        name="timm",
        module="timm.layers.activations_me",
        functions={"silu": "swish_me", "mish": "mish_me", "hardswish": "hard_swish_me"},
    ),
)

NAMES = (STOCK, COMPILE, CHECKPOINTING, *(published.name for published in PUBLISHED))


def activations(curve: str, against: Sequence[str]) -> dict[str, Callable[[], Activation]]:
    """The contenders for a curve, stock first: by name, what makes the activation and may raise in doing so."""
    entry = CURVES[curve]
    found: dict[str, Callable[[], Activation]] = {
        STOCK: lambda: entry.f,
        INVACT: lambda: lambda x: invert(x, entry),
    }
    if COMPILE in against:
        found[COMPILE] = lambda: _compiled(entry.f)
    for published in PUBLISHED:
        if published.name in against and curve in published.functions and published.installed:
            found[published.name] = _made(published, curve)
    return found


def not_installed(against: Sequence[str]) -> list[str]:
    return [published.name for published in PUBLISHED if published.name in against and not published.installed]


def _compiled(f: Activation) -> Activation:
    # A function that was compiled for many shapes and dtypes is at last not compiled any more.
    torch.compiler.reset()
    compiled: Activation = torch.compile(f, dynamic=False)
    return compiled


def _made(published: Published, curve: str) -> Callable[[], Activation]:
    return lambda: published.activation(curve)
