"""Models by name with weights in memory: random ones, as the library initialises them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from invact import patchers
from invact.pytorch.containers import tree_map_only


def with_weights(name: str, image_size: int | None = None) -> nn.Module:
    """The model that `patchers.load` gives, for training, but in fp32 on the CPU; errors as of that.

    Example:
        >>> sum(p.numel() for p in with_weights("timm/test_vit").parameters())
        371240
    """
    owner, own_name = patchers.resolve(name)
    owner.require()
    with _CPUForMeta():
        model: nn.Module = owner.load(own_name, torch.float32, image_size).train()
    return model


class _CPUForMeta(TorchFunctionMode):
    """Models are loaded on the meta device, without weights; inside this block they get weights, on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(torch.device, _not_meta, (args, kwargs or {}))
        return func(*args, **kwargs)


def _not_meta(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device
