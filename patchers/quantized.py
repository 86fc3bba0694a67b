"""What a model in 4 bits takes while its adapters train: layers that stand for those of bitsandbytes, in bytes alone.

For dry runs, on machines where bitsandbytes is not: nothing here is ever put into a model that trains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import library_of
from .request_errors import AdapterError

BLOCK = 64
"""Weights that share a scale, their largest magnitude."""

BLOCK_OF_SCALES = 256
"""Scales that share a scale of their own where they are quantised in turn."""


def with_4bit_base(model: nn.Module) -> nn.Module:
    """The model with its linear layers as transformers and bitsandbytes would have loaded them in 4 bits.

    Counted is what QLoRA trains on: NF4 with double quantisation
    (`BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)` with the model's
    dtype to compute in): half a byte a weight, a byte for 64 and four for 16,384; 0.516 bytes in all. Without double
    quantisation, which is off unless it is asked for, it were 0.563. Two tables of a kilobyte for each layer are left
    out. Embeddings, norms and what transformers leaves as it is, such as the output embeddings, keep their dtype:
    PEFT's `prepare_model_for_kbit_training`, which would make them float32, is not counted either.

    Args:
        model: of transformers, best on the meta device; it is changed itself. What the new layers hold is zeros.

    Raises:
        AdapterError: it is no model of transformers, or it has no layer that would be quantised.

    Example:
        >>> from invact.patchers import load, with_4bit_base
        >>> model = with_4bit_base(load("meta-llama/Llama-3.1-8B", torch.bfloat16))
        >>> layer = model.model.layers[0].mlp.up_proj
        >>> layer.weight.shape, layer.weight.dtype
        (torch.Size([29360128, 1]), torch.uint8)
    """
    library = library_of(model)
    if library is None or library.name != "transformers":
        raise AdapterError(
            f"{type(model).__name__} is not loaded in 4 bits: transformers does that, for models of its own. "
            "Leave the quantisation out."
        )
    replaced = list(_replaced(model))
    if not replaced:
        raise AdapterError(
            f"{type(model).__name__} has no layer that transformers would load in 4 bits. Leave the quantisation out."
        )
    for path, layer in replaced:
        model.set_submodule(path, Linear4bit(layer))
    return model


class Linear4bit(nn.Linear):
    """Has the bytes of bitsandbytes' layer of that name, keeps and allocates what that does, and holds zeros.

    In forward and in backward the weight is there in the dtype of the input for the length of one product. For backward
    neither it nor the input is kept, since the weight does not train.

    Args:
        layer: a linear layer, or transformers' `Conv1D`, whose weight lies the other way.

    Attributes:
        weight: uint8, two weights in each, as a column; frozen.
        absmax: uint8, a scale for each `BLOCK` of weights.
        nested_absmax: float32, a scale for each `BLOCK_OF_SCALES` of those.
    """

    def __init__(self, layer: nn.Module) -> None:
        kept: Any = layer.weight
        out_features, in_features = kept.shape if isinstance(layer, nn.Linear) else reversed(kept.shape)
        super().__init__(in_features, out_features, bias=False, device="meta")
        device, numel = kept.device, kept.numel()
        packed = torch.zeros(-(-numel // 2), 1, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        bias: Any = layer.bias
        frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_parameter("bias", frozen)
        self.compute_dtype = kept.dtype
        scales = -(-numel // BLOCK)
        self.register_buffer("absmax", torch.zeros(scales, dtype=torch.uint8, device=device))
        self.register_buffer("nested_absmax", torch.zeros(-(-scales // BLOCK_OF_SCALES), device=device))

    def forward(self, input: Tensor) -> Tensor:
        """As a linear layer's: (*, in_features) to (*, out_features), in the dtype of `input`."""
        x = input.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        shape = (self.out_features, self.in_features)
        y: Tensor = _Product.apply(x, self.weight, self.absmax, shape, bias)
        return y.to(input.dtype)


class _Product(torch.autograd.Function):
    """`MatMul4Bit` of bitsandbytes: what it keeps is parameters, and stands in the context like any attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, absmax: Tensor, shape: tuple[int, int], bias: Any) -> Tensor:
        ctx.packed, ctx.absmax, ctx.shape = packed, absmax, shape
        return F.linear(x, _dequantised(packed, absmax, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        weight = _dequantised(ctx.packed, ctx.absmax, ctx.shape, gradient.dtype)
        return torch.matmul(gradient, weight), None, None, None, None


def _dequantised(packed: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight as one kernel writes it, beside the scales in 32 bits, which another has made; zeros, as all is."""
    scales = absmax.float()
    weight = torch.zeros(shape, dtype=dtype, device=packed.device)
    del scales
    return weight


def _replaced(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that transformers would replace, with their paths."""
    from transformers.pytorch_utils import Conv1D

    left_out = _left_out(model)
    for path, module in model.named_modules():
        # Classes that derive from `Linear` may do anything with their weight, and stay.
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and not _is_named(path, left_out):
            yield path, module


def _left_out(model: Any) -> list[str]:
    """What transformers does not quantise: tied weights, the last layer, output embeddings, what must be float32."""
    from transformers import integrations
    from transformers.quantizers import base

    holder: Any = base if hasattr(base, "get_keys_to_not_convert") else integrations  # there in transformers 4
    listed = holder.get_keys_to_not_convert
    return [*listed(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]


def _is_named(path: str, names: list[str]) -> bool:
    """Whether the module, or one around it, is one of these, or its path ends so: transformers' own rule."""
    return any(re.match(rf"(?:{name})(?:\.|$)", path) or path.endswith(name) for name in names)
