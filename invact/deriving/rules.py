"""How the output of each operator is made again: one entry per operator, by the name of its node in autograd's graph.

A rule is given the node and looks for what the operator read: what the node itself keeps, under the names of
PyTorch's `derivatives.yaml`, or else what its producer gave. Every step rounds as it did in forward, so the gradients
are bit for bit those of stock PyTorch. None of them costs more than reading its operands and writing its output.

A new operator is one entry here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.handles import Derived, Handle, Kept

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
    raw = getattr(node, "_raw_saved_" + name, None)
    if raw is None:
        return None
    try:
        data = raw.data
    except RuntimeError:  # the node has been run, or does not need it
        return None
    if isinstance(data, Kept):
        return (data.apart or data) if data.source else None
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
    if any(each is None for each in read):
        return None
    sources = tuple(each for each in read if isinstance(each, Handle))
    if len(sources) < len(read):
        make = functools.partial(_with_numbers, make, [None if isinstance(each, Handle) else each for each in read])
    return Derived(make, sources, joins, moves)


def _with_numbers(make: Callable[..., Tensor], numbers: list[Tensor | None], *tensors: Tensor) -> Tensor:
    rest = iter(tensors)
    return make(*[next(rest) if number is None else number for number in numbers])


# --- one tensor, element by element ---------------------------------------------------------------------


def _pointwise(operator: Callable[..., Tensor], *names: str, read: str = "self") -> Rule:
    """An operator of one tensor; `names` are its settings, in order."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = operand(node, read, 0, find)
        if x is None:
            return None
        if not names:
            return derived(operator, x)
        chosen = settings(node, *names)
        return derived(lambda x: operator(x, *chosen), x)

    return rule


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu(x, alpha, scale, input_scale)  # type: ignore[no-any-return]


def _gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


RULES.update(
    {
        "AbsBackward0": _pointwise(torch.abs),
        "AcosBackward0": _pointwise(torch.acos),
        "AsinBackward0": _pointwise(torch.asin),
        "AtanBackward0": _pointwise(torch.atan),
        "CeluBackward0": _pointwise(F.celu, "alpha"),
        "ClampBackward1": _pointwise(torch.clamp, "min", "max"),
        "ClampMaxBackward0": _pointwise(torch.clamp_max, "max"),
        "ClampMinBackward0": _pointwise(torch.clamp_min, "min"),
        "CosBackward0": _pointwise(torch.cos),
        "EluBackward0": _pointwise(_elu, "alpha", "scale", "input_scale"),
        "ErfBackward0": _pointwise(torch.erf),
        "ErfcBackward0": _pointwise(torch.erfc),
        "ExpBackward0": _pointwise(torch.exp),
        "Expm1Backward0": _pointwise(torch.expm1),
        "GeluBackward0": _pointwise(_gelu, "approximate"),
        "GluBackward0": _pointwise(F.glu, "dim"),
        "HardshrinkBackward0": _pointwise(F.hardshrink, "lambd"),
        "HardsigmoidBackward0": _pointwise(F.hardsigmoid),
        "HardswishBackward0": _pointwise(F.hardswish),
        "HardtanhBackward0": _pointwise(F.hardtanh, "min_val", "max_val"),
        "LeakyReluBackward0": _pointwise(F.leaky_relu, "negative_slope"),
        "LogBackward0": _pointwise(torch.log),
        "Log1PBackward0": _pointwise(torch.log1p),
        "Log2Backward0": _pointwise(torch.log2),
        "LogSigmoidBackward0": _pointwise(F.logsigmoid),
        "LogitBackward0": _pointwise(torch.logit, "eps"),
        "MishBackward0": _pointwise(F.mish),
        "NegBackward0": _pointwise(torch.neg),
        "PowBackward0": _pointwise(torch.pow, "exponent"),
        "ReciprocalBackward0": _pointwise(torch.reciprocal),
        "ReluBackward0": _pointwise(torch.relu),
        "RsqrtBackward0": _pointwise(torch.rsqrt),
        "SgnBackward0": _pointwise(torch.sgn),
        "SigmoidBackward0": _pointwise(torch.sigmoid),
        "SiluBackward0": _pointwise(F.silu),
        "SinBackward0": _pointwise(torch.sin),
        "SinhBackward0": _pointwise(torch.sinh),
        "SoftplusBackward0": _pointwise(F.softplus, "beta", "threshold"),
        "SoftshrinkBackward0": _pointwise(F.softshrink, "lambd"),
        "SqrtBackward0": _pointwise(torch.sqrt),
        "TanhBackward0": _pointwise(torch.tanh),
        "ThresholdBackward0": _pointwise(lambda x, threshold: F.threshold(x, threshold, 0.0), "threshold"),
    }
)


# --- several tensors, element by element ----------------------------------------------------------------


@rule("MulBackward0")
def product(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.mul, operand(node, "self", 0, find), operand(node, "other", 1, find))


@rule("DivBackward0")
def quotient(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.div, operand(node, "self", 0, find), operand(node, "other", 1, find))


@rule("AddBackward0", "SubBackward0")
def total(node: Node, number: int, find: Find) -> Derived | None:
    """Only of what is there without another sum on the way: else a residual stream would be summed up from its start."""
    a, b = produced(node, 0, find), produced(node, 1, find)
    if a is None or b is None or a.joins or b.joins:
        return None
    (alpha,) = settings(node, "alpha")
    operator = torch.add if node.name() == "AddBackward0" else torch.sub
    return derived(lambda a, b: operator(a, b, alpha=alpha), a, b, joins=True)


@rule("AddcmulBackward0")
def sum_with_product(node: Node, number: int, find: Find) -> Derived | None:
    a = produced(node, 0, find)
    b, c = operand(node, "tensor1", 1, find), operand(node, "tensor2", 2, find)
    if a is None or a.joins:
        return None
    (value,) = settings(node, "value")
    return derived(lambda a, b, c: torch.addcmul(a, b, c, value=value), a, b, c, joins=True)


@rule("MaximumBackward0")
def larger(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.maximum, operand(node, "self", 0, find), operand(node, "other", 1, find))


@rule("MinimumBackward0")
def smaller(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.minimum, operand(node, "self", 0, find), operand(node, "other", 1, find))


@rule("PreluKernelBackward0")
def prelu(node: Node, number: int, find: Find) -> Derived | None:
    return derived(aten._prelu_kernel, operand(node, "self", 0, find), operand(node, "weight", 1, find))


@rule("WhereBackward0")
def chosen(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.where, saved(node, "condition"), produced(node, 0, find), produced(node, 1, find))


@rule("MaskedFillBackward1")
def masked(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.masked_fill, produced(node, 0, find), saved(node, "mask"), produced(node, 1, find))


# --- norms and softmax ----------------------------------------------------------------------------------


def _told(node: Node, statistic: str) -> Any:
    """What the norm's call said and its node does not know; see `hooks.norm_settings`."""
    kept = getattr(node, "_raw_saved_" + statistic).data
    return kept.setting if isinstance(kept, Kept) else None


def _affine(node: Node, name: str, edge: int, find: Find) -> tuple[bool, Handle | None]:
    """Whether a weight or bias can be had, and its handle; a norm may have none."""
    raw = getattr(node, "_raw_saved_" + name, None)
    if raw is not None and raw.data is None:
        return True, None
    found = operand(node, name, edge, find)
    return found is not None, found if isinstance(found, Handle) else None


def _norm(operator: Callable[..., Tensor], x: Handle | Tensor | None, *affine: tuple[bool, Handle | None]) -> Any:
    """A norm's recipe; `operator` takes x, weight and bias, of which some may be missing."""
    if not all(had for had, _ in affine):
        return None
    there = [handle is not None for _, handle in affine]
    if all(there):
        return derived(operator, x, *[handle for _, handle in affine])

    def with_what_there_is(x: Tensor, *weights: Tensor) -> Tensor:
        rest = iter(weights)
        return operator(x, *[next(rest) if is_there else None for is_there in there])

    return derived(with_what_there_is, x, *[handle for _, handle in affine if handle is not None])


@rule("NativeLayerNormBackward0")
def layer_norm(node: Node, number: int, find: Find) -> Derived | None:
    told = _told(node, "result2")
    if number or told is None:
        return None
    (shape,) = settings(node, "normalized_shape")
    weight, bias = _affine(node, "weight", 1, find), _affine(node, "bias", 2, find)
    eps = told.eps
    return _norm(  # type: ignore[no-any-return]
        lambda x, w, b: torch.layer_norm(x, shape, w, b, eps), operand(node, "input", 0, find), weight, bias
    )


@rule("FusedRmsNormBackward0")
def rms_norm(node: Node, number: int, find: Find) -> Derived | None:
    told = _told(node, "result1")
    if number or told is None:
        return None
    (shape,) = settings(node, "normalized_shape")
    eps = told.eps
    return _norm(  # type: ignore[no-any-return]
        lambda x, w: torch.rms_norm(x, shape, w, eps),
        operand(node, "input", 0, find),
        _affine(node, "weight", 1, find),
    )


@rule("NativeGroupNormBackward0")
def group_norm(node: Node, number: int, find: Find) -> Derived | None:
    told = _told(node, "result2")
    if number or told is None:
        return None
    (groups,) = settings(node, "group")
    eps = told.eps
    return _norm(  # type: ignore[no-any-return]
        lambda x, w, b: torch.group_norm(x, groups, w, b, eps),
        operand(node, "input", 0, find),
        _affine(node, "weight", 1, find),
        _told_bias(node, told, find),
    )


def _told_bias(node: Node, told: Any, find: Find) -> tuple[bool, Handle | None]:
    """A bias that the node does not keep: its gradient needs no more than dy."""
    if told.bias is None:
        return True, None
    if told.bias.apart is not None:
        return True, told.bias.apart
    found = produced(node, 2, find)
    return (found is not None, found) if node.next_functions[2][0] is not None else (told.bias.source, told.bias)


@rule("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
def batch_norm(node: Node, number: int, find: Find) -> Derived | None:
    """From the statistics that are kept; the running ones are not touched."""
    told = _told(node, "result2")
    if number or told is None:
        return None
    eps, training = told.eps, node._saved_training
    x, weight, bias = operand(node, "input", 0, find), _affine(node, "weight", 1, find), _told_bias(node, told, find)
    if not training:
        mean, var = saved(node, "running_mean"), saved(node, "running_var")
        return _norm(  # type: ignore[no-any-return]
            lambda x, w, b, mean, var: F.batch_norm(x, mean, var, w, b, eps=eps),
            x, weight, bias, (mean is not None, mean), (var is not None, var),
        )  # fmt: skip
    if node.name() != "NativeBatchNormBackward0":  # only they themselves know how they round
        return _norm(lambda x, w, b: F.batch_norm(x, None, None, w, b, True, eps=eps), x, weight, bias)  # type: ignore[no-any-return]
    mean, invstd = saved(node, "result1"), saved(node, "result2")
    return _norm(  # type: ignore[no-any-return]
        lambda x, w, b, mean, invstd: _batch_normed(x, w, b, mean, invstd, eps),
        x, weight, bias, (mean is not None, mean), (invstd is not None, invstd),
    )  # fmt: skip


def _batch_normed(x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return aten.batch_norm_elemt(x, w, b, mean, invstd, eps)  # type: ignore[no-any-return]
    # As the kernel for CPUs does it: one product and sum per element, with both factors worked out before.
    wide = torch.promote_types(torch.float32, x.dtype)
    mean, scale = mean.to(wide), invstd.to(wide)
    scale = scale if w is None else scale * w.to(wide)
    shift = torch.addcmul(torch.zeros_like(mean) if b is None else b.to(wide), mean, scale, value=-1)
    along = [1, -1] + [1] * (x.dim() - 2)
    return torch.addcmul(shift.view(along), x.to(wide), scale.view(along)).to(x.dtype)


# --- casts, dropout, what moves -------------------------------------------------------------------------


@rule("ToCopyBackward0")
def cast(node: Node, number: int, find: Find) -> Derived | None:
    to, (producer, output) = node._input_metadata[0], node.next_functions[0]
    if producer is None or producer._input_metadata[output].device != to.device:
        return None
    dtype = to.dtype
    return derived(lambda x: x.to(dtype), find(producer, output))


@rule("NativeDropoutBackward0")
def dropout(node: Node, number: int, find: Find) -> Derived | None:
    p = node._saved_p
    scale = 0.0 if p == 1 else 1 / (1 - p)
    x, mask = produced(node, 0, find), saved(node, "result1")
    return derived(lambda x, mask: aten.native_dropout_backward(x, mask, scale), x, mask) if number == 0 else None


@rule("SoftmaxBackward0", "LogSoftmaxBackward0")
def softmax(node: Node, number: int, find: Find) -> Derived | None:
    x = produced(node, 0, find)
    (dim,), dtype = settings(node, "dim"), node._input_metadata[0].dtype
    operator = torch.softmax if node.name() == "SoftmaxBackward0" else torch.log_softmax
    return derived(lambda x: operator(x, dim, dtype=dtype), x)


@rule("CloneBackward0")
def copy(node: Node, number: int, find: Find) -> Derived | None:
    """The recipe's own `stride` lays it out."""
    return derived(torch.clone, produced(node, 0, find))


@rule("CatBackward0", "StackBackward0")
def joined(node: Node, number: int, find: Find) -> Derived | None:
    (dim,) = settings(node, "dim")
    operator = torch.cat if node.name() == "CatBackward0" else torch.stack
    parts = [produced(node, edge, find) for edge in range(len(node.next_functions))]
    return derived(lambda *parts: operator(parts, dim), *parts)


@rule("RollBackward0")
def rolled(node: Node, number: int, find: Find) -> Derived | None:
    shifts, dims = settings(node, "shifts", "dims")
    return derived(lambda x: torch.roll(x, shifts, dims), produced(node, 0, find))


@rule("FlipBackward0")
def flipped(node: Node, number: int, find: Find) -> Derived | None:
    (dims,) = settings(node, "dims")
    return derived(lambda x: torch.flip(x, dims), produced(node, 0, find))


@rule("RepeatBackward0")
def repeated(node: Node, number: int, find: Find) -> Derived | None:
    (repeats,) = settings(node, "repeats")
    return derived(lambda x: x.repeat(repeats), produced(node, 0, find))


# --- views ----------------------------------------------------------------------------------------------


def _view(operator: Callable[..., Tensor], *names: str) -> Rule:
    """A view by its settings."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return derived(lambda x: operator(x, *chosen), x, moves=False)

    return rule


def _part(operator: Callable[..., tuple[Tensor, ...]], *names: str) -> Rule:
    """One of several views."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = produced(node, 0, find)
        if x is None:
            return None
        chosen = settings(node, *names)
        return derived(lambda x: operator(x, *chosen)[number], x, moves=False)

    return rule


@rule("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ExpandBackward0", "AliasBackward0")
def reshaped(node: Node, number: int, find: Find) -> Derived | None:
    x = produced(node, 0, find)
    if x is None:
        return None
    shape = node._input_metadata[0].shape
    if node.name() == "ExpandBackward0":
        return derived(lambda x: x.expand(shape), x, moves=False)
    return derived(lambda x: x.reshape(shape), x, moves=False)


RULES.update(
    {
        "DiagonalBackward0": _view(torch.diagonal, "offset", "dim1", "dim2"),
        "PermuteBackward0": _view(torch.permute, "dims"),
        "SelectBackward0": _view(torch.select, "dim", "index"),
        "SliceBackward0": _view(aten.slice, "dim", "start", "end", "step"),
        "SqueezeBackward0": _view(torch.squeeze),
        "SqueezeBackward1": _view(torch.squeeze, "dim"),
        "SqueezeBackward2": _view(torch.squeeze, "dim"),
        "TBackward0": _view(torch.t),
        "TransposeBackward0": _view(torch.transpose, "dim0", "dim1"),
        "UnsqueezeBackward0": _view(torch.unsqueeze, "dim"),
        "UnfoldBackward0": _view(lambda x, dim, size, step: x.unfold(dim, size, step), "dimension", "size", "step"),
        "SplitBackward0": _part(aten.split, "split_size", "dim"),
        "SplitWithSizesBackward0": _part(aten.split_with_sizes, "split_sizes", "dim"),
        "UnbindBackward0": _part(torch.unbind, "dim"),
    }
)
