"""The names of tensors in sentences, by the node of autograd's graph that made them."""

from __future__ import annotations

import torch

_WORDS = {
    "NativeLayerNormBackward0": "a LayerNorm's output",
    "FusedRmsNormBackward0": "an RMSNorm's output",
    "NativeGroupNormBackward0": "a GroupNorm's output",
    "NativeBatchNormBackward0": "a BatchNorm's output",
    "CudnnBatchNormBackward0": "a BatchNorm's output",
    "MiopenBatchNormBackward0": "a BatchNorm's output",
    "NativeDropoutBackward0": "a dropped tensor",
    "CloneBackward0": "a copy",
    "MulBackward0": "a product",
    "DivBackward0": "a quotient",
    "AddBackward0": "a sum",
    "AddcmulBackward0": "a sum",
    "SubBackward0": "a difference",
    "PowBackward0": "a power",
    "CatBackward0": "a concatenation",
    "StackBackward0": "a concatenation",
    "EmbeddingBackward0": "an embedding",
    "AddmmBackward0": "a matrix product",
    "MmBackward0": "a matrix product",
    "BmmBackward0": "a matrix product",
    "BaddbmmBackward0": "a matrix product",
    "ConvolutionBackward0": "a convolution's output",
    "MaxPool2DWithIndicesBackward0": "max pooling's output",
    "SoftmaxBackward0": "softmax's output",
    "LogSoftmaxBackward0": "log_softmax's output",
}

_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Transpose", "Permute", "Slice", "Select", "Split", "Unsqueeze", "T")


def in_words(node: str, dtype: torch.dtype) -> str:
    """What a node gives.

    Example:
        >>> in_words("MulBackward0", torch.float32), in_words("ToCopyBackward0", torch.bfloat16)
        ('a product', 'a bfloat16 copy')
        >>> in_words("SiluBackward0", torch.float32), in_words("", torch.float32)
        ("silu's output", 'a tensor without a gradient')
    """
    if node == "ToCopyBackward0":
        return f"a {str(dtype).removeprefix('torch.')} copy"
    operator = node.partition("Backward")[0]
    if not operator:
        return "a tensor without a gradient"
    if operator in _VIEWS:
        return "a view"
    return _WORDS.get(node) or f"{operator[:1].lower()}{operator[1:]}'s output"


def listed(words: list[str]) -> str:
    """As "a, b and c".

    Example:
        >>> listed(["a sum"]), listed(["a sum", "a mask", "a product"])
        ('a sum', 'a sum, a mask and a product')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
