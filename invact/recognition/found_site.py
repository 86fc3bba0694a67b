"""A place in a model where a pointwise activation is computed, as the walk found it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from invact.kernels import Curve
from invact.recognition.dependencies import Dependencies
from invact.recognition.written_expression import Written


@dataclass(frozen=True)
class Found:
    """A module that computes a curve, or an expression in a method of a module that does.

    Attributes:
        path: of the module; for an expression "path.method:curve", numbered from the second of a kind on.
        curve: what is computed there.
        label: the class name of the module, or the expression as written.
        computes: the module, or one that computes the expression.
        module_path: of the module, or of the module whose method holds the expression.
        dependencies: what is read there besides the input; None if that can change unseen.
        written: the expression, or None for a module.
        replaced: whether somebody has put another forward on this one module.
    """

    path: str
    curve: Curve
    label: str
    computes: nn.Module
    module_path: str
    dependencies: Dependencies | None
    written: Written | None = None
    replaced: bool = False
