"""The mode of simulated tensors: fake ones that take after what real kernels refuse, lay out and keep."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from invact.errors.own_errors import ImitatedError, users_call
from invact.pytorch.fake_tensors import FakeTensor, FakeTensorMode, on_meta
from invact.pytorch.operators import detach_operator, device_query
from invact.pytorch.tensors import suggest_memory_format
from invact.simulation.setting import Setting
from invact.simulation.time_limit import Deadline


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
        if out is NotImplemented:  # a subclass of tensors, such as DTensor, takes it apart first
            return out
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
