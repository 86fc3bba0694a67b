"""Operators that work element by element, of one tensor or of several. Sums are among `sums`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from invact.deriving.gated import gated_if_it_is
from invact.deriving.handles import Derived
from invact.deriving.rules.operands import derived, operand, optional, produced, saved, settings, with_optional
from invact.deriving.rules.registry import Find, Node, Rule, register

aten = torch.ops.aten


def pointwise(operator: Callable[..., Tensor], *names: str) -> Rule:
    """A rule for an operator of one tensor, which its node may keep as "self"; `names` are its settings, in order."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        x = operand(node, "self", 0, find)
        if x is None:
            return None
        if not names:
            return derived(operator, x)
        chosen = settings(node, *names)
        return derived(lambda x: operator(x, *chosen), x)

    return rule


def of_tensors(operator: Callable[..., Tensor], *names: str, **settings_of: str) -> Rule:
    """A rule for an operator of several tensors, by their names in its node; `settings_of` names its settings there."""

    def rule(node: Node, number: int, find: Find) -> Derived | None:
        read = [operand(node, name, edge, find) for edge, name in enumerate(names)]
        chosen = dict(zip(settings_of, settings(node, *settings_of.values()), strict=True))
        return derived(functools.partial(operator, **chosen) if chosen else operator, *read)

    return rule


def _elu(x: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    return aten.elu(x, alpha, scale, input_scale)  # type: ignore[no-any-return]


register("AbsBackward0")(pointwise(torch.abs))
register("AcosBackward0")(pointwise(torch.acos))
register("AcoshBackward0")(pointwise(torch.acosh))
register("AsinBackward0")(pointwise(torch.asin))
register("AsinhBackward0")(pointwise(torch.asinh))
register("AtanBackward0")(pointwise(torch.atan))
register("AtanhBackward0")(pointwise(torch.atanh))
register("CeilBackward0")(pointwise(torch.ceil))
register("CeluBackward0")(pointwise(F.celu, "alpha"))
register("CeluBackward1")(pointwise(F.celu, "alpha"))
register("ClampBackward1")(pointwise(torch.clamp, "min", "max"))
register("ClampMaxBackward0")(pointwise(torch.clamp_max, "max"))
register("ClampMinBackward0")(pointwise(torch.clamp_min, "min"))
register("CosBackward0")(pointwise(torch.cos))
register("CoshBackward0")(pointwise(torch.cosh))
register("EluBackward0")(pointwise(_elu, "alpha", "scale", "input_scale"))
register("EluBackward1")(pointwise(_elu, "alpha", "scale", "input_scale"))
register("ErfBackward0")(pointwise(torch.erf))
register("ErfcBackward0")(pointwise(torch.erfc))
register("ErfinvBackward0")(pointwise(torch.erfinv))
register("Exp2Backward0")(pointwise(torch.exp2))
register("ExpBackward0")(pointwise(torch.exp))
register("Expm1Backward0")(pointwise(torch.expm1))
register("FloorBackward0")(pointwise(torch.floor))
register("FracBackward0")(pointwise(torch.frac))
register("GluBackward0")(pointwise(F.glu, "dim"))
register("HardshrinkBackward0")(pointwise(F.hardshrink, "lambd"))
register("HardsigmoidBackward0")(pointwise(F.hardsigmoid))
register("HardswishBackward0")(pointwise(F.hardswish))
register("HardtanhBackward0")(pointwise(F.hardtanh, "min_val", "max_val"))
register("LeakyReluBackward0")(pointwise(F.leaky_relu, "negative_slope"))
register("LeakyReluBackward1")(pointwise(F.leaky_relu, "negative_slope"))
register("LogBackward0")(pointwise(torch.log))
register("Log10Backward0")(pointwise(torch.log10))
register("Log1PBackward0")(pointwise(torch.log1p))
register("Log2Backward0")(pointwise(torch.log2))
register("LogSigmoidBackward0")(pointwise(F.logsigmoid))
register("LogitBackward0")(pointwise(torch.logit, "eps"))
register("MishBackward0")(pointwise(F.mish))
register("NegBackward0")(pointwise(torch.neg))
register("PowBackward0")(pointwise(torch.pow, "exponent"))
register("ReciprocalBackward0")(pointwise(torch.reciprocal))
register("ReluBackward0")(pointwise(torch.relu))
register("RoundBackward0")(pointwise(torch.round))
register("RsqrtBackward0")(pointwise(torch.rsqrt))
register("SgnBackward0")(pointwise(torch.sgn))
register("SigmoidBackward0")(pointwise(torch.sigmoid))
register("SignBackward0")(pointwise(torch.sign))
register("SiluBackward0")(pointwise(F.silu))
register("SinBackward0")(pointwise(torch.sin))
register("SincBackward0")(pointwise(torch.sinc))
register("SinhBackward0")(pointwise(torch.sinh))
register("SoftplusBackward0")(pointwise(F.softplus, "beta", "threshold"))
register("SoftshrinkBackward0")(pointwise(F.softshrink, "lambd"))
register("SqrtBackward0")(pointwise(torch.sqrt))
register("TanBackward0")(pointwise(torch.tan))
register("TanhBackward0")(pointwise(torch.tanh))
register("TrilBackward0")(pointwise(torch.tril, "diagonal"))
register("TriuBackward0")(pointwise(torch.triu, "diagonal"))
register("TruncBackward0")(pointwise(torch.trunc))


register("Atan2Backward0")(of_tensors(torch.atan2, "self", "other"))
register("ComplexBackward0")(of_tensors(torch.complex, "real", "imag"))
register("ClampMaxBackward1")(of_tensors(torch.clamp_max, "self", "max"))
register("ClampMinBackward1")(of_tensors(torch.clamp_min, "self", "min"))
register("CopysignBackward0")(of_tensors(torch.copysign, "self", "other"))
register("DivBackward0")(of_tensors(torch.div, "self", "other"))
register("DivBackward2")(of_tensors(torch.div, "self", "other", rounding_mode="rounding_mode"))
register("FmaxBackward0")(of_tensors(torch.fmax, "self", "other"))
register("FminBackward0")(of_tensors(torch.fmin, "self", "other"))
register("FmodBackward1")(of_tensors(torch.fmod, "self", "other"))
register("GeluBackward0")(of_tensors(F.gelu, "self", approximate="approximate"))
register("HypotBackward0")(of_tensors(torch.hypot, "self", "other"))
register("Logaddexp2Backward0")(of_tensors(torch.logaddexp2, "self", "other"))
register("LogaddexpBackward0")(of_tensors(torch.logaddexp, "self", "other"))
register("MaximumBackward0")(of_tensors(torch.maximum, "self", "other"))
register("MinimumBackward0")(of_tensors(torch.minimum, "self", "other"))
register("PowBackward1")(of_tensors(torch.pow, "self", "exponent"))
register("PreluKernelBackward0")(of_tensors(aten._prelu_kernel, "self", "weight"))
register("RemainderBackward1")(of_tensors(torch.remainder, "self", "other"))
register("XlogyBackward0")(of_tensors(torch.xlogy, "self", "other"))


_PRODUCT = of_tensors(torch.mul, "self", "other")


@register("MulBackward0")
def product(node: Node, number: int, find: Find) -> Derived | None:
    handle = _PRODUCT(node, number, find)
    return None if handle is None else gated_if_it_is(handle)


@register("PowBackward2")
def power_of_a_number(node: Node, number: int, find: Find) -> Derived | None:
    base = node._saved_self
    return derived(lambda x: torch.pow(base, x), operand(node, "exponent", 0, find))


@register("ClampBackward0")
def between(node: Node, number: int, find: Find) -> Derived | None:
    """Between tensors, of which one may be missing; a node that has been run keeps neither."""
    if saved(node, "self") is None:
        return None
    low, high = optional(node, "min", 1, find), optional(node, "max", 2, find)
    return with_optional(torch.clamp, operand(node, "self", 0, find), low, high)


@register("WhereBackward0")
def where(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.where, saved(node, "condition"), produced(node, 0, find), produced(node, 1, find))


@register("MaskedFillBackward1")
def masked_fill(node: Node, number: int, find: Find) -> Derived | None:
    return derived(torch.masked_fill, produced(node, 0, find), saved(node, "mask"), produced(node, 1, find))
