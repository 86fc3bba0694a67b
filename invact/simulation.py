"""The circumstances of training that a probe imitates: device, autocast, attention, checkpointed regions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Setting:
    """What a probe simulates: `autocast` is a dtype or None, `attention` is "fused" or "math"."""

    device: torch.device
    autocast: torch.dtype | None = None
    attention: str = "fused"


@contextmanager
def autocast_as_set(setting: Setting) -> Iterator[None]:
    """torch.autocast, which switches itself off where the device it is for is missing; this does not."""
    if setting.autocast is None:
        yield
        return
    device = stand_in(setting.device).type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, setting.autocast)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def stand_in(device: torch.device) -> torch.device:
    """The device of the fake tensors that stand for those on `device`.

    Before PyTorch 2.15 (seen in 2.6, 2.9 and the CPU build of 2.13; those between were not tried) autograd on
    fake CUDA tensors ends the process where there is no GPU: there fake CPU tensors take their place.
    """
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return device if torch.version.cuda is not None and release >= (2, 15) else torch.device("cpu")


class AsOnGpu(TorchFunctionMode):
    """Makes fake tensors keep what the kernels of a real GPU keep.

    Without it PyTorch, which finds no GPU to ask, falls to an attention that keeps the N x N matrix; and on CPU
    tensors dropout keeps its mask in the dtype of its input, not as one byte per element.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._fused = setting.attention == "fused"
        self._on_cpu = stand_in(setting.device).type == "cpu"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._on_cpu and func is F.dropout:
            return _dropout(*args, **kwargs)
        if not self._fused and func in (_STOCK_ATTENTION, F.multi_head_attention_forward):
            with sdpa_kernel(SDPBackend.MATH):  # on CPU tensors PyTorch would take its fused kernel
                return func(*args, **kwargs)
        if self._fused and func is _STOCK_ATTENTION:
            return _attention(*args, **kwargs)
        if self._fused and func is F.multi_head_attention_forward:
            # Inside it this mode is off, so its attention is put in by name.
            F.scaled_dot_product_attention = _attention
            try:
                return func(*args, **kwargs)
            finally:
                F.scaled_dot_product_attention = _STOCK_ATTENTION
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


_STOCK_ATTENTION = F.scaled_dot_product_attention


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The fused kernels take (batch, heads, length, width) only. Real tensors are another thread's.
    if isinstance(query, FakeTensor) and query.dim() == 4:
        return _fused_attention(query, *args, **kwargs)
    return _STOCK_ATTENTION(query, *args, **kwargs)


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
    head_dim = value.shape[-1]
    out: Tensor
    # The kernels read 16 bytes at a time, so PyTorch pads heads of other widths first.
    query, key, value = (F.pad(t, (0, -t.shape[-1] % 8)) for t in (query, key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    else:
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
        bias = None if attn_mask is None else _additive(attn_mask, query, key)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
    return out[..., :head_dim]


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


class AsRealKernels(TorchDispatchMode):
    """Makes fake tensors refuse the dtypes, and take the strides, that the kernels behind real ones do.

    On fake tensors PyTorch lets matrix products of mixed dtypes pass, and its batch norm on the CPU lays its output
    out as the input is: then a reshape after it copies in one case and not in the other. How much oneDNN's LSTM keeps
    it does not know at all.
    """

    _products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution)

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._for_cpu = setting.device.type == "cpu"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in self._products:
            # addmm(bias, a, b) has its factors last, convolution(x, weight, bias) first.
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            factors = tensors[:2] if func.overloadpacket is torch.ops.aten.convolution else tensors[-2:]
            if len({factor.dtype for factor in factors}) > 1:
                raise RuntimeError(f"the factors of {func} have different dtypes: {[f.dtype for f in factors]}")
        if func.overloadpacket is torch.ops.aten.mkldnn_rnn_layer and self._for_cpu:
            raise NotImplementedError("only oneDNN knows how much its LSTM keeps")
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.native_batch_norm and args[0].device.type == "cpu":
            normed, *statistics = out
            return (normed.contiguous(memory_format=suggest_memory_format(args[0])), *statistics)
        return out


@contextmanager
def fake_tensor_log_silent() -> Iterator[None]:
    """PyTorch logs a failing operation with its traceback; the error itself is enough."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


@contextmanager
def checkpoints_counted(count: list[int], *, run_them: bool) -> Iterator[None]:
    """Counts this thread's regions under torch.utils.checkpoint; runs them as ordinary code unless `run_them`."""
    thread = threading.get_ident()
    reentrant = torch_checkpoint.CheckpointFunction
    # The generator's name differs between releases of PyTorch; `checkpoint` looks it up here at each call.
    generators = {
        name: getattr(torch_checkpoint, name)
        for name in (
            "_checkpoint_without_reentrant_generator",
            "_checkpoint_without_reentrant_generator_impl",
        )
        if hasattr(torch_checkpoint, name)
    }

    def is_ours() -> bool:
        return threading.get_ident() == thread

    def counted_function(function: Any, preserve: bool, *args: Any) -> Any:
        if is_ours():
            count[0] += 1
        return function(*args) if is_ours() and not run_them else reentrant.apply(function, preserve, *args)

    def counted(generator: Any) -> Any:
        def region(*args: Any, **kwargs: Any) -> Iterator[None]:
            if is_ours():
                count[0] += 1
            if is_ours() and not run_them:
                yield
            else:
                yield from generator(*args, **kwargs)

        return region

    torch_checkpoint.CheckpointFunction = SimpleNamespace(apply=counted_function)  # type: ignore[misc, assignment]
    for name, generator in generators.items():
        setattr(torch_checkpoint, name, counted(generator))
    try:
        yield
    finally:
        torch_checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
        for name, generator in generators.items():
            setattr(torch_checkpoint, name, generator)
