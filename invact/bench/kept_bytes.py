"""What a real forward keeps for backward, counted."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from invact.ledger.kept_storages import KeptStorages
from invact.ledger.ledger import Ledger


def counted(model: nn.Module, forward: Callable[[], Tensor], compiled: bool) -> tuple[Tensor, int]:
    """What `forward` gives, and the bytes that are kept for backward then, weights and buffers left out.

    Args:
        forward: runs `model`.
        compiled: whether it runs compiled, where the ledger, which looks into modules, sees nothing: what autograd is
            given to keep is counted then.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.GELU())
        >>> counted(model, lambda: model(torch.ones(2, 4)).sum(), compiled=False)[1]
        96
    """
    if compiled:
        with KeptStorages([*model.parameters(), *model.buffers()]) as storages:
            loss = forward()
        return loss, storages.nbytes()
    with Ledger(model) as ledger:
        loss = forward()
    return loss, ledger.memory().total_bytes
