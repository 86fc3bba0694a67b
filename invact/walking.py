"""Walk a model and find every place where a pointwise activation is computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from invact.expressions import written_in
from invact.kernels import Curve
from invact.recognition import recognise
from invact.rewriting import Written
from invact.swapping import Inverted


@dataclass(frozen=True)
class Found:
    """A module that computes a curve, or an expression in a method of a module that does.

    Attributes:
        path: of the module; for an expression "path.method:curve", numbered from the second of a kind on.
        curve: what is computed there.
        label: the class name of the module, or the expression as written.
        computes: the module, or one that computes the expression.
        module_path: of the module, or of the module whose method holds the expression.
        written: the expression, or None for a module.
    """

    path: str
    curve: Curve
    label: str
    computes: nn.Module
    module_path: str
    written: Written | None = None


def walk(model: nn.Module) -> list[Found]:
    """Every site of `model`, in the order of `model.named_modules()`.

    Example:
        >>> [site.path for site in walk(nn.Sequential(nn.Linear(4, 4), nn.GELU()))]
        ['1']
        >>> walk(nn.TransformerEncoderLayer(8, 2, activation="gelu"))[0].path
        '_ff_block:gelu'
    """
    sites: list[Found] = []
    for path, module in model.named_modules():
        if isinstance(module, Inverted):
            continue
        curve = recognise(module)
        if curve is not None:
            sites.append(Found(path, curve, type(module).__name__, module, path))
        else:
            sites += _written_sites(path, module)
    return sites


def _written_sites(path: str, module: nn.Module) -> list[Found]:
    seen: Counter[str] = Counter()
    sites = []
    for written in written_in(module):
        name = f"{path}.{written.method}:{written.curve.name}".lstrip(".")
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name}.{seen[name]}"
        sites.append(Found(numbered, written.curve, written.text, written.computes, path, written))
    return sites
