"""Made-up inputs: tensors that a model takes for images, sound and text; no random number is drawn."""

from __future__ import annotations

import math

import torch
from torch import nn


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's first layer expects of a floating input."""
    weights = (p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1)
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def waves(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Values within [-1, 1] that look random to a model, without touching a random number generator."""
    return torch.arange(math.prod(shape), device=device).sin().to(dtype).view(shape)


def token_ids(batch_size: int, seq_len: int, vocabulary: int, device: torch.device | str) -> torch.Tensor:
    """Token ids from the upper half of the vocabulary, where padding and mask tokens rarely are."""
    first = vocabulary // 2
    ids = first + torch.arange(batch_size * seq_len, device=device) % (vocabulary - first)
    return ids.view(batch_size, seq_len)
