"""The circumstances of training that a probe imitates: device, autocast, attention, checkpointed regions.

All of it holds for the thread that asks and no other.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode

from invact.errors.own_errors import ImitatedError, users_call
from invact.pytorch.attention import (
    efficient_attention,
    flash_attention,
    math_attention,
    seen_by_modes,
    stock_attention,
    stock_multi_head_attention,
)
from invact.pytorch.checkpointing import CheckpointFunction, checkpoint_generator
from invact.pytorch.fake_tensors import FakeTensor, FakeTensorMode, on_meta
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import detach_operator, device_query, has_fused_rms_norm
from invact.pytorch.saved_tensor_hooks import hooks_taken_off, torch_graph
from invact.pytorch.tensors import suggest_memory_format
from invact.pytorch.version_check import RELEASE
from invact.simulation.time_limit import Deadline


@dataclass(frozen=True)
class Setting:
    """What a probe simulates: `autocast` is a dtype or None, `attention` is "fused" or "math"."""

    device: torch.device
    autocast: torch.dtype | None = None
    attention: str = "fused"


def autocast_here(device: torch.device) -> torch.dtype | None:
    """The dtype of the torch.autocast for `device` inside which this is called, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextmanager
def autocast_as_set(setting: Setting) -> Iterator[None]:
    """torch.autocast, which switches itself off where the device it is for is missing; this does not."""
    device = stand_in(setting.device).type
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    if setting.autocast is not None:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, setting.autocast)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()  # of casts of simulated weights: a block of the caller's would keep them
        torch.set_autocast_enabled(device, enabled)
        torch.set_autocast_dtype(device, dtype)


def stand_in(device: torch.device) -> torch.device:
    """The device of the fake tensors that stand for those on `device`.

    Before PyTorch 2.15 (seen in 2.6, 2.9 and the CPU build of 2.13; those between were not tried) autograd on
    fake CUDA tensors ends the process where there is no GPU: there fake CPU tensors take their place.
    """
    if device.type != "cuda" or torch.cuda.is_available():
        return device
    return device if torch.version.cuda is not None and RELEASE >= (2, 15) else torch.device("cpu")


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


class Simulation(FakeTensorMode):
    """Fake tensors that refuse the dtypes, and take the strides, that the kernels behind real ones do; and in time.

    On fake tensors PyTorch lets matrix products of mixed dtypes pass, and its batch and group norm on the CPU lay their
    output out otherwise: then a reshape after it copies in one case and not in the other. Norms with 32-bit weights
    keep 32-bit statistics of 16-bit inputs there, and layer norms on a GPU always do. How much oneDNN's LSTM keeps it
    does not know at all.

    All in the one mode that fake tensors need: each further one would add a tenth to the time of a pass.
    """

    # And where what makes their statistics 32-bit ones stands among the arguments: the weight, running means as well.
    _norms = (
        (torch.ops.aten.native_layer_norm, (2,)),
        (torch.ops.aten.native_group_norm, (1,)),
        (torch.ops.aten.native_batch_norm, (1, 3)),
    )
    _products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution)
    _imitated = frozenset((*(norm for norm, _ in _norms), *_products, torch.ops.aten.mkldnn_rnn_layer))

    def __init__(self, setting: Setting) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._for_cpu = setting.device.type == "cpu"
        self._deadline: Deadline | None = None
        self._in_operator = False  # what it is made up of is PyTorch's affair

    @contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """The block's operations as inside `invact.simulation.time_limit.TimeLimit`."""
        with Deadline(seconds) as self._deadline:
            try:
                yield
            finally:
                self._deadline = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is device_query and type(args[0]) is FakeTensor:  # two of three calls
            return args[0].device
        if func is detach_operator and type(args[0]) is FakeTensor and args[0].constant is None:  # every third of those
            return self._detached(args[0])
        if self._in_operator:
            return users_call(self.dispatch, func, types, args, kwargs or {})
        self._in_operator = True
        try:
            out = self._as_real_kernels(func, types, args, kwargs or {})
        finally:
            self._in_operator = False
        if self._deadline is not None:
            self._deadline.check(out)
        return out

    def _detached(self, tensor: FakeTensor) -> FakeTensor:
        """As `dispatch` gives it, which looks up in its cache what a detached tensor looks like."""
        with on_meta(self):
            detached = detach_operator(tensor)
        return FakeTensor(self, detached, tensor.fake_device)

    def _as_real_kernels(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = getattr(func, "overloadpacket", None)  # which operators of higher order have not
        if packet not in self._imitated:
            return users_call(self.dispatch, func, types, args, kwargs)
        if packet in self._products:
            # addmm(bias, a, b) has its factors last, convolution(x, weight, bias) first.
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            factors = tensors[:2] if packet is torch.ops.aten.convolution else tensors[-2:]
            if len({factor.dtype for factor in factors}) > 1:
                raise ImitatedError(f"the factors of {func} have different dtypes: {[f.dtype for f in factors]}")
        if packet is torch.ops.aten.mkldnn_rnn_layer and self._for_cpu:
            raise ImitatedError("only oneDNN knows how much its LSTM keeps")
        out: Any = users_call(self.dispatch, func, types, args, kwargs)
        for norm, places in self._norms:
            if packet is norm and args[0].device.type == "cpu":
                normed, *statistics = out
                if norm is not torch.ops.aten.native_layer_norm:
                    normed = normed.contiguous(memory_format=suggest_memory_format(args[0]))
                on_gpu = norm is torch.ops.aten.native_layer_norm and not self._for_cpu
                if on_gpu or any(args[place] is not None and args[place].dtype is torch.float32 for place in places):
                    statistics = [s.float() if s.dtype.itemsize == 2 else s for s in statistics]
                return (normed, *statistics)
        return out


@contextmanager
def fake_tensor_log_silent() -> Iterator[None]:
    """PyTorch logs a failing operation with its traceback; the error itself is enough."""
    log, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(of_others)
    try:
        yield
    finally:
        log.removeFilter(of_others)


@contextmanager
def checkpoints_counted(count: list[int], *, run_them: bool) -> Iterator[None]:
    """Counts this thread's regions under torch.utils.checkpoint; runs them as ordinary code unless `run_them`.

    PyTorch has no way to be told of a region, so its two ways to run one are wrapped for the length of the block.
    What another library puts over ours meanwhile stays, and finds what was there before us underneath.
    """
    thread = threading.get_ident()
    over = False
    name = checkpoint_generator()
    generator, apply = getattr(torch_checkpoint, name), CheckpointFunction.apply

    def is_ours() -> bool:
        return threading.get_ident() == thread and not over

    def counted_apply(function: Any, preserve: bool, *args: Any) -> Any:
        if is_ours():
            count[0] += 1
        return function(*args) if is_ours() and not run_them else apply(function, preserve, *args)

    def counted_generator(*args: Any, **kwargs: Any) -> Iterator[None]:
        if is_ours():
            count[0] += 1
        if is_ours() and not run_them:
            yield
        else:
            yield from generator(*args, **kwargs)

    with (
        _instead(torch_checkpoint, name, counted_generator),
        _instead(CheckpointFunction, "apply", staticmethod(counted_apply)),
    ):
        try:
            yield
        finally:
            over = True


@contextmanager
def hooks_standing_aside(ours: Callable[[Any], bool], count: list[int]) -> Iterator[None]:
    """Counts where this thread can have no hooks on kept tensors, inside torch.func, and takes those of ours off there.

    Args:
        ours: told by the function that packs.
    """
    thread = threading.get_ident()
    stock = torch_graph.disable_saved_tensors_hooks

    @contextmanager
    def set_aside(message: str) -> Iterator[None]:
        if threading.get_ident() != thread:
            with stock(message):
                yield
            return
        count[0] += 1
        with hooks_taken_off(ours), stock(message):
            yield

    with _instead(torch_graph, "disable_saved_tensors_hooks", set_aside):
        yield


@contextmanager
def _instead(owner: Any, name: str, ours: Any) -> Iterator[None]:
    """Sets an attribute for the length of the block, and undoes that if nobody has set it since."""
    own = vars(owner)
    was_there, before = name in own, own.get(name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        if vars(owner).get(name) is ours:
            if was_there:
                setattr(owner, name, before)
            else:
                delattr(owner, name)
