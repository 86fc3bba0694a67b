"""At which modules of a model the hooks are set."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def places(model: nn.Module, allowed: Callable[[str], bool]) -> dict[str, bool]:
    """The modules that set hooks while they run, by path, and whether tensors are derived inside them.

    The model itself comes first. Its blocks, which stand in containers, set hooks as well: as long as those of the
    model are the innermost they find them and leave them; but run anew by gradient checkpointing, in backward or with
    the checkpoint's own hooks inside the model's, a block is all there is. Where `allowed` changes, from a module to
    one inside it, hooks are set that say so.

    Example:
        >>> places(nn.Sequential(nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8), nn.GELU())), lambda path: True)
        {'': True, '1': True}
    """
    chosen: dict[str, bool] = {}
    state: dict[str, bool] = {}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        outside = state.get(parent, False) if path else False
        inside = state[path] = allowed(path)
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if inside != outside or (inside and _is_block(model, path, module)):
            chosen[path] = inside
    return chosen


def _is_block(model: nn.Module, path: str, module: nn.Module) -> bool:
    """A part of a model that is built of others and stands with its like in a container."""
    if not path or next(module.children(), None) is None or isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return isinstance(model.get_submodule(path.rpartition(".")[0]), (nn.Sequential, nn.ModuleList, nn.ModuleDict))
