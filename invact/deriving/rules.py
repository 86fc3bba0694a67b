"""How the output of each operator is made again: one entry per operator, by the name of its node in autograd's graph.

A rule is given the node and looks for what the operator read: what the node itself keeps, under the names of
PyTorch's `derivatives.yaml`, or else what its producer gave. Every step rounds as it did in forward, so the gradients
are bit for bit those of stock PyTorch. None of them costs more than reading its operands and writing its output; none
sums over more than one dimension, or over what one group of a norm holds.

What autograd does not record cannot be made again: the number in `x + 1.0`, `1 - x`, `x.masked_fill(mask, 0.0)`,
`torch.where(mask, x, 0.0)` and `F.threshold`, and a constant tensor that is added. A norm's eps is read from the frame
of its function (`hooks.NormSettings`), a padding's number from the padded tensor (`FILLED`).

A new operator is one entry here, and one case in tests/test_deriving_rules.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.gated import gated_if_it_is
from invact.deriving.handles import Bits, Derived, Handle, Kept, LogProbabilities, kept_by
from invact.deriving.parameters import is_parameter
from invact.kernels.masks import dropped, unpacked
from invact.kernels.rounding import rounded
from invact.pytorch.backward import node_name
from invact.pytorch.tensors import make_contiguous_strides_for

aten = torch.ops.aten

Node = Any
Find = Callable[[Node, int], "Handle | None"]
Rule = Callable[[Node, int, Find], "Derived | None"]

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# --- what a node knows --------------------------------------------------------------------------------


def operand(node: Node, name: str, edge: int, find: Find) -> Handle | Tensor | None:
    """What an operator read: kept by the node, or at hand from the producer."""
    kept = saved(node, name)
    return produced(node, edge, find) if kept is None else kept


def saved(node: Node, name: str) -> Handle | Tensor | None:
    """What the node itself keeps under this name; a number is a tensor without a handle."""
    data = kept_by(node, name)
    if isinstance(data, Kept):
        return (data.apart or data) if data.may_be_read else None
    return data if isinstance(data, Handle) or (isinstance(data, Tensor) and not data.dim()) else None


def produced(node: Node, edge: int, find: Find) -> Handle | None:
    """What an operator read, from its producer."""
    producer, number = node.next_functions[edge]
    return None if producer is None else find(producer, number)


def settings(node: Node, *names: str) -> list[Any]:
    return [signed(getattr(node, "_saved_" + name)) for name in names]


def signed(value: Any) -> Any:
    """Autograd shows negative dimensions as unsigned numbers."""
    if isinstance(value, tuple):
        return tuple(signed(each) for each in value)
    return value - 2**64 if type(value) is int and value >= 2**63 else value


def derived(
    make: Callable[..., Tensor], *read: Handle | Tensor | None, joins: bool = False, moves: bool = True
) -> Derived | None:
    """The recipe, if all that it reads is there; numbers become settings."""
    numbers = False
    for each in read:
        if each is None:
            return None
        numbers = numbers or isinstance(each, Tensor)
    if not numbers:
        return Derived(make, read, joins, moves)  # type: ignore[arg-type]
    make = functools.partial(_with_numbers, make, [None if isinstance(each, Handle) else each for each in read])
    return Derived(make, tuple(each for each in read if isinstance(each, Handle)), joins, moves)


def _with_numbers(make: Callable[..., Tensor], numbers: list[Tensor | None], *tensors: Tensor) -> Tensor:
    rest = iter(tensors)
    return make(*[next(rest) if number is None else number for number in numbers])


def _optional(node: Node, name: str, edge: int, find: Find) -> tuple[bool, Handle | None]:
    """Whether a weight or bias can be had, and its handle; a norm may have none."""
    if kept_by(node, name) is None:
        return True, None
    found = operand(node, name, edge, find)
    return found is not None, found if isinstance(found, Handle) else None


def _with_optional(
    operator: Callable[..., Tensor], x: Handle | Tensor | None, *optional: tuple[bool, Handle | Tensor | None]
) -> Derived | None:
    """A recipe whose `operator` takes, after x, what may be missing, as the weight and bias of a norm."""
    if not all(had for had, _ in optional):
        return None
    there = [handle is not None for _, handle in optional]
    if all(there):
        return derived(operator, x, *[handle for _, handle in optional])

    def with_what_there_is(x: Tensor, *weights: Tensor) -> Tensor:
        rest = iter(weights)
        return operator(x, *[next(rest) if is_there else None for is_there in there])

    return derived(with_what_there_is, x, *[handle for _, handle in optional if handle is not None])


# --- one tensor, element by element ---------------------------------------------------------------------


def _pointwise(operator: Callable[..., Tensor], *names: str) -> Rule:
    """An operator of one tensor; `names` are its settings, in order."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = operand(node, "self", 0, find)
        if x is None:
            return None
        if not names:
            return derived(operator, x)
        chosen = settings(node, *names)
        return derived(lambda x: operator(x, *chosen), x)

    return rule


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu(x, alpha, scale, input_scale)  # type: ignore[no-any-return]


RULES.update(
    {
        "AbsBackward0": _pointwise(torch.abs),
        "AcosBackward0": _pointwise(torch.acos),
        "AcoshBackward0": _pointwise(torch.acosh),
        "AsinBackward0": _pointwise(torch.asin),
        "AsinhBackward0": _pointwise(torch.asinh),
        "AtanBackward0": _pointwise(torch.atan),
        "AtanhBackward0": _pointwise(torch.atanh),
        "CeilBackward0": _pointwise(torch.ceil),
        "CeluBackward0": _pointwise(F.celu, "alpha"),
        "CeluBackward1": _pointwise(F.celu, "alpha"),
        "ClampBackward1": _pointwise(torch.clamp, "min", "max"),
        "ClampMaxBackward0": _pointwise(torch.clamp_max, "max"),
        "ClampMinBackward0": _pointwise(torch.clamp_min, "min"),
        "CosBackward0": _pointwise(torch.cos),
        "CoshBackward0": _pointwise(torch.cosh),
        "EluBackward0": _pointwise(_elu, "alpha", "scale", "input_scale"),
        "EluBackward1": _pointwise(_elu, "alpha", "scale", "input_scale"),
        "ErfBackward0": _pointwise(torch.erf),
        "ErfcBackward0": _pointwise(torch.erfc),
        "ErfinvBackward0": _pointwise(torch.erfinv),
        "Exp2Backward0": _pointwise(torch.exp2),
        "ExpBackward0": _pointwise(torch.exp),
        "Expm1Backward0": _pointwise(torch.expm1),
        "FloorBackward0": _pointwise(torch.floor),
        "FracBackward0": _pointwise(torch.frac),
        "GluBackward0": _pointwise(F.glu, "dim"),
        "HardshrinkBackward0": _pointwise(F.hardshrink, "lambd"),
        "HardsigmoidBackward0": _pointwise(F.hardsigmoid),
        "HardswishBackward0": _pointwise(F.hardswish),
        "HardtanhBackward0": _pointwise(F.hardtanh, "min_val", "max_val"),
        "LeakyReluBackward0": _pointwise(F.leaky_relu, "negative_slope"),
        "LeakyReluBackward1": _pointwise(F.leaky_relu, "negative_slope"),
        "LogBackward0": _pointwise(torch.log),
        "Log10Backward0": _pointwise(torch.log10),
        "Log1PBackward0": _pointwise(torch.log1p),
        "Log2Backward0": _pointwise(torch.log2),
        "LogSigmoidBackward0": _pointwise(F.logsigmoid),
        "LogitBackward0": _pointwise(torch.logit, "eps"),
        "MishBackward0": _pointwise(F.mish),
        "NegBackward0": _pointwise(torch.neg),
        "PowBackward0": _pointwise(torch.pow, "exponent"),
        "ReciprocalBackward0": _pointwise(torch.reciprocal),
        "ReluBackward0": _pointwise(torch.relu),
        "RoundBackward0": _pointwise(torch.round),
        "RsqrtBackward0": _pointwise(torch.rsqrt),
        "SgnBackward0": _pointwise(torch.sgn),
        "SigmoidBackward0": _pointwise(torch.sigmoid),
        "SignBackward0": _pointwise(torch.sign),
        "SiluBackward0": _pointwise(F.silu),
        "SinBackward0": _pointwise(torch.sin),
        "SincBackward0": _pointwise(torch.sinc),
        "SinhBackward0": _pointwise(torch.sinh),
        "SoftplusBackward0": _pointwise(F.softplus, "beta", "threshold"),
        "SoftshrinkBackward0": _pointwise(F.softshrink, "lambd"),
        "SqrtBackward0": _pointwise(torch.sqrt),
        "TanBackward0": _pointwise(torch.tan),
        "TanhBackward0": _pointwise(torch.tanh),
        "TrilBackward0": _pointwise(torch.tril, "diagonal"),
        "TriuBackward0": _pointwise(torch.triu, "diagonal"),
        "TruncBackward0": _pointwise(torch.trunc),
    }
)


# --- several tensors, element by element ----------------------------------------------------------------


def _of(operator: Callable[..., Tensor], *names: str, **settings_of: str) -> Rule:
    """An operator of several tensors, by their names in its node; `settings_of` has the names of its settings there."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        read = [operand(node, name, edge, find) for edge, name in enumerate(names)]
        chosen = dict(zip(settings_of, settings(node, *settings_of.values()), strict=True))
        return derived(functools.partial(operator, **chosen) if chosen else operator, *read)

    return rule


RULES.update(
    {
        "Atan2Backward0": _of(torch.atan2, "self", "other"),
        "ComplexBackward0": _of(torch.complex, "real", "imag"),
        "ClampMaxBackward1": _of(torch.clamp_max, "self", "max"),
        "ClampMinBackward1": _of(torch.clamp_min, "self", "min"),
        "CopysignBackward0": _of(torch.copysign, "self", "other"),
        "DivBackward0": _of(torch.div, "self", "other"),
        "DivBackward2": _of(torch.div, "self", "other", rounding_mode="rounding_mode"),
        "FmaxBackward0": _of(torch.fmax, "self", "other"),
        "FminBackward0": _of(torch.fmin, "self", "other"),
        "FmodBackward1": _of(torch.fmod, "self", "other"),
        "GeluBackward0": _of(F.gelu, "self", approximate="approximate"),
        "HypotBackward0": _of(torch.hypot, "self", "other"),
        "Logaddexp2Backward0": _of(torch.logaddexp2, "self", "other"),
        "LogaddexpBackward0": _of(torch.logaddexp, "self", "other"),
        "MaximumBackward0": _of(torch.maximum, "self", "other"),
        "MinimumBackward0": _of(torch.minimum, "self", "other"),
        "PowBackward1": _of(torch.pow, "self", "exponent"),
        "PreluKernelBackward0": _of(aten._prelu_kernel, "self", "weight"),
        "RemainderBackward1": _of(torch.remainder, "self", "other"),
        "XlogyBackward0": _of(torch.xlogy, "self", "other"),
    }
)


_PRODUCT = _of(torch.mul, "self", "other")


@rule("MulBackward0")
def product(node: Node, number: int, find: Find) -> Derived | None:
    handle = _PRODUCT(node, number, find)
    return None if handle is None else gated_if_it_is(handle)


@rule("PowBackward2")
def power_of_a_number(node: Node, number: int, find: Find) -> Derived | None:
    base = node._saved_self
    return derived(lambda x: torch.pow(base, x), operand(node, "exponent", 0, find))


@rule("ClampBackward0")
def between(node: Node, number: int, find: Find) -> Derived | None:
    """Between tensors, of which one may be missing; a node that has been run keeps neither."""
    if saved(node, "self") is None:
        return None
    low, high = _optional(node, "min", 1, find), _optional(node, "max", 2, find)
    return _with_optional(torch.clamp, operand(node, "self", 0, find), low, high)


def _sum(operator: Callable[..., Tensor], *names: str, summands: int, **settings_of: str) -> Rule:
    """A sum, only of what is there without another one on the way: else a residual stream would be summed up from its
    start. Its first few operands are the `summands`."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        read = [operand(node, name, edge, find) for edge, name in enumerate(names)]
        if any(not isinstance(each, Handle) or each.joins for each in read[:summands]):
            return None
        chosen = dict(zip(settings_of, settings(node, *settings_of.values()), strict=True))
        return derived(functools.partial(operator, **chosen), *read, joins=True)

    return rule


SUMS: dict[str, Rule] = {
    "AddBackward0": _sum(torch.add, "self", "other", summands=2, alpha="alpha"),
    "SubBackward0": _sum(torch.sub, "self", "other", summands=2, alpha="alpha"),
    "AddcdivBackward0": _sum(torch.addcdiv, "self", "tensor1", "tensor2", summands=1, value="value"),
    "AddcmulBackward0": _sum(torch.addcmul, "self", "tensor1", "tensor2", summands=1, value="value"),
    "LerpBackward0": _sum(torch.lerp, "self", "end", summands=2, weight="weight"),
    "LerpBackward1": _sum(torch.lerp, "self", "end", "weight", summands=2),
}
RULES.update(SUMS)


@rule("WhereBackward0")
def where(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.where, saved(node, "condition"), produced(node, 0, find), produced(node, 1, find))


@rule("MaskedFillBackward1")
def masked_fill(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.masked_fill, produced(node, 0, find), saved(node, "mask"), produced(node, 1, find))


# --- norms and softmax ----------------------------------------------------------------------------------


def norm(statistic: str, *names: str) -> Callable[[Rule], Rule]:
    """Registers what makes a norm's first output.

    In the stead of a number it is given what the norm's call said and its node does not know, `hooks.NormSettings`,
    which is told with that statistic.
    """

    def register(function: Rule) -> Rule:
        @rule(*names)
        def with_settings(node: Node, number: int, find: Find) -> Derived | None:
            kept = kept_by(node, statistic)
            told = kept.setting if isinstance(kept, Kept) else None
            return None if number or told is None else function(node, told, find)

        return with_settings

    return register


@norm("result2", "NativeLayerNormBackward0")
def layer_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (shape,) = settings(node, "normalized_shape")
    weight, bias = _optional(node, "weight", 1, find), _optional(node, "bias", 2, find)
    eps = told.eps
    return _with_optional(
        lambda x, w, b: torch.layer_norm(x, shape, w, b, eps), operand(node, "input", 0, find), weight, bias
    )


@norm("result1", "FusedRmsNormBackward0")
def rms_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (shape,) = settings(node, "normalized_shape")
    eps = told.eps
    return _with_optional(
        lambda x, w: torch.rms_norm(x, shape, w, eps),
        operand(node, "input", 0, find),
        _optional(node, "weight", 1, find),
    )


@norm("result2", "NativeGroupNormBackward0")
def group_norm(node: Node, told: Any, find: Find) -> Derived | None:
    (groups,) = settings(node, "group")
    eps = told.eps
    return _with_optional(
        lambda x, w, b: torch.group_norm(x, groups, w, b, eps),
        operand(node, "input", 0, find),
        _optional(node, "weight", 1, find),
        _told_bias(told),
    )


def _told_bias(told: Any) -> tuple[bool, Handle | None]:
    """A bias that the node does not keep: its gradient needs no more than dy."""
    if told.bias is None:
        return True, None
    return told.bias.may_be_read, told.bias.apart or told.bias


@norm("result2", "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(node: Node, told: Any, find: Find) -> Derived | None:
    """From the statistics that are kept; the running ones are not touched."""
    eps, training = told.eps, node._saved_training
    x, weight, bias = operand(node, "input", 0, find), _optional(node, "weight", 1, find), _told_bias(told)
    if not training:
        if told.running is None:
            return None
        if math.prod(node._input_metadata[0].shape) < 128 * told.images * told.running[0].numel():
            return None  # the copies, which nobody counts, are to be nothing beside what they make again
        mean, var = (each.repeat(told.images) for each in told.running)
        return _with_optional(lambda x, w, b: F.batch_norm(x, mean, var, w, b, eps=eps), x, weight, bias)
    if node_name(node) != "NativeBatchNormBackward0":  # only they themselves know how they round
        return _with_optional(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=eps), x, weight, bias)
    mean, invstd = saved(node, "result1"), saved(node, "result2")
    return _with_optional(
        lambda x, w, b, mean, invstd: _batch_normed(x, w, b, mean, invstd, eps),
        x, weight, bias, (mean is not None, mean), (invstd is not None, invstd),
    )  # fmt: skip


def _batch_normed(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return aten.batch_norm_elemt(x, w, b, mean, invstd, eps)  # type: ignore[no-any-return]
    # As the two kernels for CPUs do it. One takes things as they lie and rounds at each step.
    along = [1, -1] + [1] * (x.dim() - 2)
    if not lies_as_usual(x):
        normed = (x - mean.view(along)) * invstd.view(along)
        normed = normed if w is None else normed * w.view(along)
        return (normed if b is None else normed + b.view(along)).to(x.dtype)
    # The other has one product and sum per element, with both factors worked out before.
    wide = torch.promote_types(torch.float32, x.dtype)
    mean, scale = mean.to(wide), invstd.to(wide)
    scale = scale if w is None else scale * w.to(wide)
    shift = torch.addcmul(torch.zeros_like(mean) if b is None else b.to(wide), mean, scale, value=-1)
    return torch.addcmul(shift.view(along), x.to(wide), scale.view(along)).to(x.dtype)


def lies_as_usual(x: Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


@rule("WeightNormInterfaceBackward0")
def normed_weight(node: Node, number: int, find: Find) -> Derived | None:
    if number:
        return None
    (dim,) = settings(node, "dim")
    v, g = operand(node, "v", 0, find), operand(node, "g", 1, find)
    return derived(lambda v, g: torch._weight_norm_interface(v, g, dim)[0], v, g)


ON_THE_WAY = {"MeanBackward1", "SumBackward1", "VarBackward0"}
"""Made again for another's sake alone: one that is kept itself stays, small as it is beside what it is read from."""


@rule("MeanBackward1", "SumBackward1")
def along_a_row(node: Node, number: int, find: Find) -> Derived | None:
    """A mean, say, that a norm written out in steps takes off."""
    dim, keepdim = settings(node, "dim", "keepdim")
    if dim is None or len(dim) != 1 or not keepdim:
        return None
    operator = torch.mean if node_name(node) == "MeanBackward1" else torch.sum
    dtype = node._input_metadata[0].dtype
    return derived(lambda x: operator(x, dim, keepdim=True, dtype=dtype), _surely_laid_out(produced(node, 0, find)))


@rule("VarBackward0")
def variance_along_a_row(node: Node, number: int, find: Find) -> Derived | None:
    dim, keepdim, correction = settings(node, "dim", "keepdim", "correction")
    if dim is None or len(dim) != 1 or not keepdim:
        return None
    x = _surely_laid_out(operand(node, "self", 0, find))
    return derived(lambda x: torch.var(x, dim, correction=correction, keepdim=True), x)


def _surely_laid_out(x: Handle | Tensor | None) -> Handle | None:
    """What is added up in another order is another sum, and does not tell how its summands lay."""
    return x if isinstance(x, Handle) and not x.unsure else None


# --- casts, dropout, what moves -------------------------------------------------------------------------


@rule("ToCopyBackward0")
def cast(node: Node, number: int, find: Find) -> Derived | None:
    """But a weight's copy is kept as stock keeps it: whoever changes the weight before backward may do so there."""
    to, (producer, output) = node._input_metadata[0], node.next_functions[0]
    if producer is None or producer._input_metadata[output].device != to.device:
        return None
    if node_name(producer) == "torch::autograd::AccumulateGrad" and is_parameter(producer.variable):
        return None
    dtype = to.dtype
    handle = derived(lambda x: x.to(dtype), find(producer, output))
    if handle is not None and producer._input_metadata[output].dtype is dtype:
        handle.unsure = True  # a copy made to lie otherwise
    return handle


@rule("NativeDropoutBackward0")
def dropout(node: Node, number: int, find: Find) -> Derived | None:
    """A mask in bits is read as it is, in one pass with the product."""
    if number:
        return None
    left = 1 - node._saved_p
    x, mask = produced(node, 0, find), saved(node, "result1")
    if isinstance(mask, Bits):
        return derived(functools.partial(_dropped_by_bits, mask.stride, left), x, mask.bits)
    return derived(lambda x, mask: _dropped(x, mask, left), x, mask)


def _dropped_by_bits(stride: tuple[int, ...], left: float, x: Tensor, bits: Tensor) -> Tensor:
    if x.is_cuda:
        return dropped(x, bits, stride, dropout_scale(left, x.dtype))
    return _dropped(x, unpacked(bits, x.numel()).as_strided(x.shape, stride), left)


def _dropped(x: Tensor, mask: Tensor, left: float) -> Tensor:
    if not x.is_cuda:
        return x * (mask.to(x.dtype) * (1 / left if left else 0.0))
    return aten.native_dropout_backward(x, mask, dropout_scale(left, x.dtype))  # type: ignore[no-any-return]


def dropout_scale(left: float, dtype: torch.dtype) -> float:
    """The kernel rounds what is left to the type that it reckons in, before it divides by it."""
    kind = torch.float64 if dtype is torch.float64 else torch.float32
    return rounded(1 / rounded(left, kind), kind) if left else 0.0


@rule("SafeSoftmaxBackward0")
def safe_softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    return derived(lambda x: aten._safe_softmax(x, dim, dtype), produced(node, 0, find))


@rule("SoftmaxBackward0")
def softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    return derived(lambda x: torch.softmax(x, dim, dtype=dtype), produced(node, 0, find))


@rule("LogSoftmaxBackward0")
def log_softmax(node: Node, number: int, find: Find) -> Derived | None:
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    logits = produced(node, 0, find)
    return None if logits is None else LogProbabilities(lambda x: torch.log_softmax(x, dim, dtype=dtype), logits)


@rule("CloneBackward0")
def clone(node: Node, number: int, find: Find) -> Derived | None:
    """The tensor itself, laid out as the copy was, which autograd does not record: `contiguous()` makes the same node
    as `clone()`, which keeps the order of the dimensions.

    Where somebody keeps the copy or a view of it, `stride` tells. On the way to another tensor the layout counts too,
    since kernels round differently where they can not read whole vectors: there a copy of what is contiguous is known
    to be so, unless it has channels, which it may have brought last.
    """
    handle = derived(lambda x: x.resolve_conj().resolve_neg(), produced(node, 0, find))
    if handle is not None:
        handle.stride = make_contiguous_strides_for(node._input_metadata[0].shape)
        may_have_channels = len(node._input_metadata[0].shape) in (4, 5)
        handle.unsure = may_have_channels or not handle.sources[0].is_contiguous()
    return handle


@rule("CatBackward0", "StackBackward0")
def cat_or_stack(node: Node, number: int, find: Find) -> Derived | None:
    (dim,) = settings(node, "dim")
    stacked = node_name(node) == "StackBackward0"
    edges = [edge for edge, (producer, _) in enumerate(node.next_functions) if producer is not None or stacked]
    if len(edges) < len(node.next_functions) and not _fill(node, dim, edges):
        return None
    operator = torch.stack if stacked else torch.cat
    handle = derived(lambda *parts: operator(parts, dim), *[produced(node, edge, find) for edge in edges])
    if handle is not None and len(edges) < len(node.next_functions):
        handle.unsure = True  # the empty one may have told how all lies
    return handle


def _fill(node: Node, dim: int, edges: list[int]) -> bool:
    """Whether these operands are all of what a cat gave: a cache of keys, say, begins with an empty tensor."""
    whole = node._input_metadata[0]
    parts = [producer._input_metadata[output] for producer, output in (node.next_functions[edge] for edge in edges)]
    if any(part.dtype is not whole.dtype or len(part.shape) != len(whole.shape) for part in parts):
        return False
    filled: int = sum(part.shape[dim] for part in parts)
    return filled == int(whole.shape[dim])


@rule("RollBackward0")
def rolled(node: Node, number: int, find: Find) -> Derived | None:
    shifts, dims = settings(node, "shifts", "dims")
    return derived(lambda x: torch.roll(x, shifts, dims), produced(node, 0, find))


@rule("Rot90Backward0")
def turned(node: Node, number: int, find: Find) -> Derived | None:
    k, dims = settings(node, "k", "dims")
    return _out_of_order(derived(lambda x: torch.rot90(x, k, dims), produced(node, 0, find)))


@rule("FlipBackward0")
def flipped(node: Node, number: int, find: Find) -> Derived | None:
    (dims,) = settings(node, "dims")
    return derived(lambda x: torch.flip(x, dims), produced(node, 0, find))


# Those that only move what is there, or take each number from a few that lie together.
RULES.update(
    {
        "AvgPool2DBackward0": _pointwise(
            aten.avg_pool2d, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"
        ),
        "ChannelShuffleBackward0": _pointwise(aten.channel_shuffle, "groups"),
        "Im2ColBackward0": _pointwise(aten.im2col, "kernel_size", "dilation", "padding", "stride"),
        "PixelShuffleBackward0": _pointwise(F.pixel_shuffle, "upscale_factor"),
        "PixelUnshuffleBackward0": _pointwise(F.pixel_unshuffle, "downscale_factor"),
        "ReflectionPad1DBackward0": _pointwise(aten.reflection_pad1d, "padding"),
        "ReflectionPad2DBackward0": _pointwise(aten.reflection_pad2d, "padding"),
        "ReflectionPad3DBackward0": _pointwise(aten.reflection_pad3d, "padding"),
        "RepeatBackward0": _pointwise(lambda x, repeats: x.repeat(repeats), "repeats"),
        "ReplicationPad1DBackward0": _pointwise(aten.replication_pad1d, "padding"),
        "ReplicationPad2DBackward0": _pointwise(aten.replication_pad2d, "padding"),
        "ReplicationPad3DBackward0": _pointwise(aten.replication_pad3d, "padding"),
        "UpsampleNearest1DBackward0": _pointwise(aten.upsample_nearest1d, "output_size", "scales"),
        "UpsampleNearest2DBackward0": _pointwise(aten.upsample_nearest2d, "output_size", "scales_h", "scales_w"),
        "UpsampleNearestExact2DBackward0": _pointwise(
            aten._upsample_nearest_exact2d, "output_size", "scales_h", "scales_w"
        ),
        "UpsampleNearest3DBackward0": _pointwise(
            aten.upsample_nearest3d, "output_size", "scales_d", "scales_h", "scales_w"
        ),
    }
)


# --- padding, whose number autograd does not record -------------------------------------------------------


@rule("ConstantPadNdBackward0")
def unpadded(node: Node, number: int, find: Find) -> Derived | None:
    """On the way to another tensor: only where no number is written, as where windows fit without a rest."""
    (pad,) = settings(node, "pad")
    if any(each > 0 for each in pad):
        return None
    return derived(lambda x: F.pad(x, pad), produced(node, 0, find))


def padded(tensor: Tensor, node: Node, find: Find) -> Derived | None:
    (pad,), x = settings(node, "pad"), produced(node, 0, find)
    corner = [0] * tensor.dim()
    for place, width in enumerate(pad):
        if width > 0:
            corner[-1 - place // 2] = -(place % 2)  # the first, or the last
    if x is None or not any(width > 0 for width in pad):
        return unpadded(node, 0, find)
    # A tensor, which no device need be waited for, and all that its padding consists of.
    value = tensor.detach()[tuple(corner)].clone()
    return derived(functools.partial(_framed, value, pad, tensor.shape, tensor.stride()), x)


def _framed(value: Tensor, pad: tuple[int, ...], shape: tuple[int, ...], stride: tuple[int, ...], x: Tensor) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=x.dtype, device=x.device).copy_(value)
    inner = made
    for place in range(len(pad) // 2):
        dim, (before, after) = x.dim() - 1 - place, pad[2 * place : 2 * place + 2]
        x = x.narrow(dim, max(-before, 0), x.shape[dim] - max(-before, 0) - max(-after, 0))
        inner = inner.narrow(dim, max(before, 0), inner.shape[dim] - max(before, 0) - max(after, 0))
    inner.copy_(x)
    return made


FILLED: dict[str, Callable[[Tensor, Node, Find], Derived | None]] = {"ConstantPadNdBackward0": padded}
"""Rules for a tensor that is kept, which take from it the number that is not recorded."""


_BILINEAR = _pointwise(aten.upsample_bilinear2d, "output_size", "align_corners", "scales_h", "scales_w")


@rule("UpsampleBilinear2DBackward0")
def bilinear(node: Node, number: int, find: Find) -> Derived | None:
    """On a GPU it does not give the same bits twice, seen on an H200 with torch 2.11."""
    return None if node._input_metadata[0].device.type == "cuda" else _BILINEAR(node, number, find)


# --- views ----------------------------------------------------------------------------------------------


def _out_of_order(view: Derived | None) -> Derived | None:
    """A view that need not be contiguous where what it is of is."""
    if view is not None:
        view.keeps_order = False
    return view


def _view(operator: Callable[..., Tensor], *names: str) -> Rule:
    """A view by its settings."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return _out_of_order(derived(lambda x: operator(x, *chosen), x, moves=False))

    return rule


def _part(operator: Callable[..., tuple[Tensor, ...]], *names: str) -> Rule:
    """One of several views."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return _out_of_order(derived(lambda x: operator(x, *chosen)[number], x, moves=False))

    return rule


def reshaped(node: Node, number: int, find: Find) -> Derived | None:
    """A view by the shape of what it gave."""
    shape = tuple(node._input_metadata[0].shape)
    return derived(lambda x: x.reshape(shape), produced(node, 0, find), moves=False)


def expanded(node: Node, number: int, find: Find) -> Derived | None:
    shape = tuple(node._input_metadata[0].shape)
    return _out_of_order(derived(lambda x: x.expand(shape), produced(node, 0, find), moves=False))


VIEWS: dict[str, Rule] = {
    "AliasBackward0": reshaped,
    "DiagonalBackward0": _view(torch.diagonal, "offset", "dim1", "dim2"),
    "ExpandBackward0": expanded,
    "PermuteBackward0": _view(torch.permute, "dims"),
    "ReshapeAliasBackward0": reshaped,
    "SelectBackward0": _view(torch.select, "dim", "index"),
    "SliceBackward0": _view(aten.slice, "dim", "start", "end", "step"),
    "SplitBackward0": _part(aten.split, "split_size", "dim"),
    "SplitWithSizesBackward0": _part(aten.split_with_sizes, "split_sizes", "dim"),
    "SqueezeBackward0": _view(torch.squeeze),
    "SqueezeBackward1": _view(torch.squeeze, "dim"),
    "SqueezeBackward2": _view(torch.squeeze, "dim"),
    "TBackward0": _view(torch.t),
    "TransposeBackward0": _view(torch.transpose, "dim0", "dim1"),
    "UnbindBackward0": _part(torch.unbind, "dim"),
    "UnfoldBackward0": _view(lambda x, dim, size, step: x.unfold(dim, size, step), "dimension", "size", "step"),
    "UnsafeSplitBackward0": _part(aten.split, "split_size", "dim"),
    "UnsafeSplitWithSizesBackward0": _part(aten.split_with_sizes, "split_sizes", "dim"),
    "UnsafeViewBackward0": reshaped,
    "UnsqueezeBackward0": _view(torch.unsqueeze, "dim"),
    "ViewAsComplexBackward0": _view(torch.view_as_complex),
    "ViewAsRealBackward0": _view(torch.view_as_real),
    "ViewBackward0": reshaped,
}
RULES.update(VIEWS)
