"""Walk a model and find every place where a pointwise activation is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from invact.kernels import Curve
from invact.recognition.curves import recognise
from invact.recognition.dependencies import Dependencies, UnseenError
from invact.recognition.dependencies_of_modules import EVERY_MODULE_HAS, dependencies_of_module
from invact.recognition.expressions import written_in
from invact.recognition.found_site import Found
from invact.swapping.patched import Patched


def walk(model: nn.Module) -> list[Found]:
    """Every site of `model`, in the order of `model.named_modules()`.

    Example:
        >>> [site.path for site in walk(nn.Sequential(nn.Linear(4, 4), nn.GELU()))]
        ['1']
        >>> walk(nn.TransformerEncoderLayer(8, 2, activation="gelu"))[0].path
        '_ff_block:gelu'
    """
    sites: list[Found] = []
    known: dict[tuple[type, str], Curve | None] = {}
    for path, module in unpatched_modules(model):
        alike = _torchs_own(module)
        if alike is None:
            curve = recognise(module)
        else:
            if alike not in known:
                known[alike] = recognise(module)
            curve = known[alike]
        if curve is None:
            sites += _written_sites(path, module)
        else:
            replaced = "forward" in vars(module)
            sites.append(
                Found(path, curve, type(module).__name__, module, path, _dependencies(module), replaced=replaced)
            )
    return sites


def _torchs_own(module: nn.Module) -> tuple[type, str] | None:
    """Equal for two leaves that compute the same, such as the dropouts of all adapters; None where it may not be so.

    Modules of PyTorch's own do what their class and their numbers say. Those of others may do as they like.
    """
    kind = type(module)
    if kind.__module__.partition(".")[0] != "torch" or module._modules or module._parameters or module._buffers:
        return None
    own = {name: value for name, value in vars(module).items() if name not in EVERY_MODULE_HAS}
    plain = all(type(value) in (bool, int, float, str, type(None)) for value in own.values())
    return (kind, repr(own)) if plain else None


def unpatched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that is as its author left it, with its path."""
    return ((path, module) for path, module in unscripted_modules(model) if not isinstance(module, Patched))


def unscripted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, but for those that TorchScript runs, which have no code in Python."""
    return ((path, m) for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule))


def _dependencies(module: nn.Module) -> Dependencies | None:
    try:
        return dependencies_of_module(module)
    except UnseenError:
        return None


def _written_sites(path: str, module: nn.Module) -> list[Found]:
    seen: Counter[str] = Counter()
    sites = []
    for written in written_in(module):
        name = f"{path}.{written.method}:{written.curve.name}".lstrip(".")
        seen[name] += 1
        numbered = name if seen[name] == 1 else f"{name}.{seen[name]}"
        sites.append(
            Found(numbered, written.curve, written.text, written.computes, path, written.dependencies, written)
        )
    return sites
