"""The inputs of a model in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def size_in_words(inputs: dict[str, Any] | tuple[Any, ...]) -> str:
    """As "32 x 512 tokens"."""
    tensors = list(inputs.values() if isinstance(inputs, dict) else inputs)
    samples = dict.fromkeys(_sample_in_words(tensor) for tensor in tensors)
    return f"{tensors[0].shape[0]} x {' + '.join(samples)}"


def _sample_in_words(tensor: torch.Tensor) -> str:
    if not tensor.is_floating_point():
        return f"{tensor.shape[1]} tokens"
    unit = {2: "samples", 3: "spectrogram"}.get(tensor.ndim, "pixels")
    size = tensor.shape[1:] if tensor.ndim < 4 else tensor.shape[-2:]
    return f"{'x'.join(map(str, size))} {unit}"
