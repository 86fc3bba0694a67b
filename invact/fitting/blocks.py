"""The blocks of a model that may be checkpointed one by one: those that stand with their like in a container."""

from __future__ import annotations

from collections import Counter

from torch import nn

from invact.swapping.checkpointed import is_checkpointed
from invact.swapping.patched import stock_class
from invact.swapping.transformers_layer import has_own_switch

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

FEW = 8
"""Fewer blocks than these in one container are taken for stages, if they hold blocks of their own: Swin's four, of
which one holds 18 of 24 layers. Chosen between those and the 12 layers of a small transformer."""


def repeated_blocks(model: nn.Module) -> list[str]:
    """The paths of the blocks, in the order of the module tree; none inside another, none checkpointed already.

    Layers of transformers that say themselves that they can be checkpointed; in other models modules of one class that
    stand together in a container and are built of others.

    Example:
        >>> def block():
        ...     return nn.Sequential(nn.Linear(8, 8), nn.GELU())
        >>> repeated_blocks(nn.Sequential(nn.Linear(4, 8), nn.Sequential(block(), block())))
        ['1.0', '1.1']
    """
    modules = dict(model.named_modules())
    own = [path for path, module in modules.items() if has_own_switch(stock_class(module))]
    if own:
        blocks = [path for path in own if not any(path.startswith(f"{other}.") for other in own)]
    else:
        blocks = _blocks_below("", model)
    return [path for path in blocks if not is_checkpointed(modules[path])]


def _blocks_below(path: str, module: nn.Module) -> list[str]:
    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    alike = Counter(stock_class(child) for _, child in children) if isinstance(module, _CONTAINERS) else Counter()
    found: list[str] = []
    for kind_path, child in children:
        count = alike[stock_class(child)]
        inside = _blocks_below(kind_path, child)
        is_block = count > 1 and not isinstance(child, nn.ModuleList) and next(child.children(), None) is not None
        found += inside if not is_block or (count < FEW and inside) else [kind_path]
    return found
