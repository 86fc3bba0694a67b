"""The inputs of a model in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_FOR_THE_LOSS = ("label", "return_loss", "start_positions", "end_positions", "bool_masked_pos")


def size_in_words(inputs: dict[str, Any] | tuple[Any, ...]) -> str:
    """As "32 x 512 tokens"; of what a model reads, without labels."""
    tensors = list(what_is_read(inputs).values() if isinstance(inputs, dict) else inputs)
    samples = dict.fromkeys(_sample_in_words(tensor) for tensor in tensors)
    return f"{tensors[0].shape[0]} x {' + '.join(samples)}"


def what_is_read(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without those that a model computes its loss with alone.

    Example:
        >>> list(what_is_read({"input_ids": [[1]], "labels": [[1]]}))
        ['input_ids']
    """
    return {name: value for name, value in inputs.items() if not any(each in name for each in _FOR_THE_LOSS)}


def _sample_in_words(tensor: torch.Tensor) -> str:
    if not tensor.is_floating_point():
        return f"{tensor.shape[-1]} tokens"
    unit = {2: "samples", 3: "spectrogram"}.get(tensor.ndim, "pixels")
    size = tensor.shape[1:] if tensor.ndim < 4 else tensor.shape[-2:]
    return f"{'x'.join(map(str, size))} {unit}"
