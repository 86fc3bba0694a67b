"""What a GPU's kernels of attention, dropout and RMS norm keep, on fake tensors where no GPU is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from invact.errors.own_errors import users_call
from invact.pytorch.attention import (
    efficient_attention,
    flash_attention,
    math_attention,
    seen_by_modes,
    stock_attention,
    stock_multi_head_attention,
)
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import has_fused_rms_norm
from invact.simulation.setting import Setting, stand_in


class AsOnGpu(TorchFunctionMode):
    """Makes fake tensors keep what the kernels of a real GPU keep.

    Without it PyTorch, which finds no GPU to ask, falls to an attention that keeps the N x N matrix; and on CPU
    tensors dropout keeps its mask in the dtype of its input, not as one byte per element.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._fused = setting.attention == "fused"
        self._device = setting.device
        self._on_cpu = stand_in(setting.device).type == "cpu"
        self._in_others_attention = False
        attention = (stock_attention, stock_multi_head_attention, F.multi_head_attention_forward)
        self._imitated = frozenset((F.dropout, F.rms_norm, torch.rms_norm, *attention))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self._imitated:  # of a hundred thousand, most of them questions for a tensor's attributes
            return users_call(func, *args, **kwargs)
        if self._on_cpu and func is F.dropout:
            return users_call(_dropout, *args, **kwargs)
        if self._on_cpu and func in (F.rms_norm, torch.rms_norm) and has_fused_rms_norm(self._device):
            # Whose frame it is called in tells deriving its eps, or that nothing does.
            imitation = F.layer_norm if func is F.rms_norm else torch.layer_norm
            return users_call(_fused_rms_norm, imitation, *args, **kwargs)
        if func is stock_attention:
            return (_fused_attention if self._fused else _math_attention)(*args, **kwargs)
        if func in (stock_multi_head_attention, F.multi_head_attention_forward):
            return self._multi_head_attention(func, args, kwargs)
        return users_call(func, *args, **kwargs)

    def _multi_head_attention(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is stock_multi_head_attention or self._in_others_attention:
            with self:  # which is off in here
                return users_call(seen_by_modes(stock_multi_head_attention), *args, **kwargs)
        # Another library has put its own in the place of PyTorch's, and comes here again when it calls that.
        self._in_others_attention = True
        try:
            with self:
                return users_call(func, *args, **kwargs)
        finally:
            self._in_others_attention = False


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if inplace:  # which is no kernel of its own on a GPU either
        dropped: Tensor = users_call(torch.dropout_, input, p, training)
        return dropped
    return users_call(torch.native_dropout, input, p, True)[0] if training and p > 0 else input


def _fused_rms_norm(
    imitation: Callable[..., Tensor],
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """As a layer norm, which keeps the same and a mean."""
    if weight is not None and weight.dtype is not input.dtype:  # then there is no kernel on a GPU either
        return torch.rms_norm(input, normalized_shape, weight, eps)
    with _WithoutMean():
        return imitation(input, normalized_shape, weight, None, torch.finfo(input.dtype).eps if eps is None else eps)


class _WithoutMean(TorchDispatchMode):
    """A layer norm keeps its other statistic twice, which counts once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_layer_norm.default:
            normed, _, invstd = out
            return normed, invstd, invstd
        return out


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.dim() != 4:  # the fused kernels take (batch, heads, length, width) only
        return users_call(
            stock_attention,
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if torch.is_autocast_enabled(query.device.type):  # which knows attention, but not its kernels by their names
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        attn_mask = attn_mask.to(dtype) if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
    head_dim = value.shape[-1]
    out: Tensor
    # The kernels read 16 bytes at a time, so PyTorch pads heads of other widths first.
    query, key, value = (F.pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t for t in (query, key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        out = users_call(flash_attention, query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    else:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        bias = None if attn_mask is None else _additive(attn_mask, query, key)
        out = users_call(efficient_attention, query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    return out[..., :head_dim]


def _math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # By name: on CPU tensors PyTorch takes its fused kernel, and the switch for that is one for all threads.
    bias = None if attn_mask is None else _added(attn_mask, query)
    options = {"scale": scale, "enable_gqa": enable_gqa}
    out: Tensor = users_call(math_attention, query, key, value, bias, dropout_p, is_causal, **options)[0]
    return out


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return _added(mask, query).expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _added(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask
