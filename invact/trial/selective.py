"""PyTorch's selective checkpointing put around the blocks of a model: products are kept, all else is made again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from invact.fitting.blocks import repeated_blocks

# Whatever multiplies matrices.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = [getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)]
_ARGUMENTS = {operator: [argument.name for argument in operator._schema.arguments] for operator in _KEPT}


def checkpoint_selectively(model: nn.Module) -> None:
    """Every repeated block keeps its matrix products, convolutions and attention, and makes the rest again in backward.

    It is done once and for good, by the `forward` of each block. A cache of keys and values is switched off, as
    transformers does for its own checkpointing: a block that is run again would write into it twice.

    Raises:
        ValueError: the model has no repeated blocks.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(*(block() for _ in range(3)))
        >>> checkpoint_selectively(model)
        >>> model(torch.ones(2, 8)).sum().backward()
    """
    paths = repeated_blocks(model)
    if not paths:
        raise ValueError(
            f"{type(model).__name__} has no blocks that repeat in a container, so there is nothing to checkpoint "
            "selectively. Put its layers into a torch.nn.ModuleList or torch.nn.Sequential."
        )
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]
    contexts = partial(create_selective_checkpoint_contexts, _kept)
    for path in paths:
        block: Any = model.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _kept(_: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Products, but no attention that drops out: where it is kept it draws no random numbers when the rest is made
    again, and whatever drops out after it would then draw others than in the forward pass."""
    names = _ARGUMENTS.get(operator)
    if names is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    if "dropout_p" in names:
        values = dict(zip(names, arguments, strict=False)) | named
        if values.get("dropout_p", 0.0) > 0:
            return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE
