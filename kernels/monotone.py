"""The curves that never turn: y alone tells f', so that no bit is kept.

Where f levels out, y is rounded more coarsely than x was, and f' is what y still tells: an ELU at ``x = -8`` in bf16
is -1, and its f' comes out as 0 and not as 0.0003. Each curve says where that is. Everywhere else f' is within two
units in the last place of stock autograd's.

A new curve is one entry here, and with parameters one in `catalogue`; CONTRIBUTING.md names what else it needs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .curve import Curve
from .rounding import rounded, widened

KEPT_CURVES = 256  # of one kind: the same parameters give the same curve, and with it its tables


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Monotone(Curve):
    """A curve whose f' is a function of y.

    Attributes:
        rise: the derivative of f' by y.
        of_output: f' from y, which may be infinite or NaN; None where a subclass has its own `slope`.
        constants: the parameters as `triton_monotone.slope` takes them.
        beyond_jump: whether y is x itself, if y falls back where it becomes so: then one bit tells which it was.
    """

    rise: Callable[[Tensor], Tensor]
    of_output: Callable[[Tensor], Tensor] | None = None
    constants: tuple[float, ...] = ()
    beyond_jump: Callable[[Tensor], Tensor] | None = None

    def sides(self, x: Tensor) -> Tensor:
        assert self.beyond_jump is not None
        return self.beyond_jump(x)

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        assert self.of_output is not None
        values = self.of_output(y)
        return values if side is None else torch.where(side, 1.0, values)

    def slope_rise(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        values = self.rise(y)
        return values if side is None else torch.where(side, 0.0, values)

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        """`constants` for an output of this dtype."""
        return self.constants


class Clamped(Monotone):
    """A curve whose f' is 1 between two outputs: `constants`, each rounded as the outputs are."""

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        return _one_between(y, *self.constants_for(rounded_to))

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        return tuple(rounded(value, dtype) for value in self.constants)


class ExponentialLinear(Monotone):
    """``scale x`` for x > 0, else ``bottom expm1(input_scale x)``; `constants` are bottom, input_scale and scale.

    f' is ``input_scale (y + bottom)`` where y <= 0, and 0 where y is -bottom as far as its dtype can tell.
    """

    def slope(self, y: Tensor, side: Tensor | None, rounded_to: torch.dtype) -> Tensor:
        bottom, input_scale, scale, lowest = self.constants_for(rounded_to)
        falling = torch.where(y <= lowest, 0.0, (y + bottom) * input_scale)
        return torch.where(y <= 0, falling, scale)

    def constants_for(self, dtype: torch.dtype) -> tuple[float, ...]:
        return (*self.constants, rounded(-self.constants[0], dtype))


# --- the curves ---------------------------------------------------------------------------------------


def _exponential_linear(
    name: str,
    f: Callable[[Tensor], Tensor],
    *,
    alpha: float,
    scale: float = 1.0,
    input_scale: float = 1.0,
    parameters: tuple[tuple[str, float], ...] = (),
    source: str,
) -> ExponentialLinear:
    bottom = scale * alpha

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x <= 0, bottom * input_scale * torch.exp(input_scale * x.clamp(max=0)), scale)

    def rise(y: Tensor) -> Tensor:
        return torch.where(y <= 0, input_scale, torch.zeros_like(y))

    return ExponentialLinear(
        name=name,
        f=f,
        derivative=derivative,
        rise=rise,
        constants=(bottom, input_scale, scale),
        parameters=parameters,
        source=source,
    )


@functools.lru_cache(KEPT_CURVES)
def elu(alpha: float = 1.0) -> Monotone:
    """``x`` for x > 0, else ``alpha (exp(x) - 1)``; f' there is ``y + alpha``.

    y loses f' where it nears -alpha: from x = -0.7 on f' is as exact as y, absolutely and not relatively.
    """
    _check_positive("elu", "alpha", alpha, zero_too=True)
    return _exponential_linear(
        "elu",
        lambda x: F.elu(x, alpha),
        alpha=alpha,
        parameters=_unless_default(("alpha", alpha, 1.0)),
        source="Clevert et al., ELU, arXiv 1511.07289",
    )


@functools.lru_cache(KEPT_CURVES)
def celu(alpha: float = 1.0) -> Monotone:
    """``x`` for x > 0, else ``alpha (exp(x / alpha) - 1)``; f' there is ``y / alpha + 1``. Loses what `elu` loses."""
    _check_positive("celu", "alpha", alpha)
    return _exponential_linear(
        "celu",
        lambda x: F.celu(x, alpha),
        alpha=alpha,
        input_scale=1 / alpha,
        parameters=_unless_default(("alpha", alpha, 1.0)),
        source="Barron, CELU, arXiv 1704.07483",
    )


@functools.lru_cache(KEPT_CURVES)
def leaky_relu(negative_slope: float = 0.01) -> Monotone:
    """``x`` for x > 0, else ``negative_slope x``. Nothing is lost: the sign of y is that of x."""
    _check_positive("leaky_relu", "negative_slope", negative_slope, zero_too=True)

    def slope(values: Tensor) -> Tensor:  # of x and y alike
        return torch.where(values > 0, 1.0, torch.full_like(values, negative_slope))

    return Monotone(
        name="leaky_relu",
        f=lambda x: F.leaky_relu(x, negative_slope),
        derivative=slope,
        of_output=slope,
        rise=torch.zeros_like,
        constants=(negative_slope,),
        parameters=_unless_default(("negative_slope", negative_slope, 0.01)),
        source="Maas et al., Rectifier Nonlinearities Improve Neural Network Acoustic Models, 2013",
    )


@functools.lru_cache(KEPT_CURVES)
def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Monotone:
    """x, held between two values; f' is 1 between them. Lost where x is a bound, rounded: f' is 0 there."""
    if not min_val < max_val:
        raise ValueError(
            f"hardtanh was given min_val={min_val} and max_val={max_val}: there is nothing between them. "
            "Pass a max_val larger than min_val."
        )
    min_val, max_val = min_val + 0.0, max_val + 0.0  # -0.0 is 0.0, to the cache above as well
    return _clamped(
        "hardtanh", min_val, max_val, _unless_default(("min_val", min_val, -1.0), ("max_val", max_val, 1.0))
    )


def _one_between(values: Tensor, low: float, high: float) -> Tensor:
    return torch.where((values <= low) | (values >= high), 0.0, torch.ones_like(values))


def _clamped(name: str, low: float, high: float, parameters: tuple[tuple[str, float], ...] = ()) -> Clamped:
    return Clamped(
        name=name,
        f=lambda x: F.hardtanh(x, low, high),
        derivative=lambda x: _one_between(x, low, high),
        rise=torch.zeros_like,
        constants=(low, high),
        parameters=parameters,
        needs_exact_output=True,
        source="Collobert, Large Scale Machine Learning, 2004; ReLU6: Krizhevsky, 2010",
    )


# From here on log1p(exp(z)) is z to the last digit of fp32, so that going over to z makes no jump.
SMOOTH_THRESHOLD = 17.0


@functools.lru_cache(KEPT_CURVES)
def softplus(beta: float = 1.0, threshold: float = 20.0) -> Monotone:
    """``log(1 + exp(beta x)) / beta``, and x itself where ``beta x > threshold``; f' is ``1 - exp(-beta y)``.

    Nothing is lost in fp32 and in 16 bits. With a threshold below 17, y falls back where it becomes x, and one bit per
    element tells on which side of the jump x was. In fp64 the default threshold makes a jump of 2e-9.
    """
    _check_positive("softplus", "beta", beta)

    def is_x_itself(x: Tensor) -> Tensor:
        # In fp32 for 16-bit types, as the stock operator compares: threshold / beta would be rounded.
        return beta * widened(x) > threshold

    def derivative(x: Tensor) -> Tensor:
        return torch.where(is_x_itself(x), 1.0, torch.sigmoid(beta * x))

    jumps = threshold < SMOOTH_THRESHOLD
    return Monotone(
        name="softplus",
        f=lambda x: F.softplus(x, beta, threshold),
        derivative=derivative,
        of_output=lambda y: -torch.expm1(-beta * y),
        rise=lambda y: beta * torch.exp(-beta * y),
        constants=(beta,),
        beyond_jump=is_x_itself if jumps else None,
        has_side=jumps,
        parameters=_unless_default(("beta", beta, 1.0), ("threshold", threshold, 20.0)),
        source="Dugas et al., Incorporating Second-Order Functional Knowledge, 2000",
    )


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _one_above_zero(values: Tensor) -> Tensor:
    return torch.where(values <= 0, 0.0, torch.ones_like(values))


def _unless_default(*parameters: tuple[str, float, float]) -> tuple[tuple[str, float], ...]:
    if all(value == default for _, value, default in parameters):
        return ()
    return tuple((name, value) for name, value, _ in parameters)


def _check_positive(curve: str, name: str, value: float, zero_too: bool = False) -> None:
    if not (value > 0 or (zero_too and value == 0)):
        raise ValueError(
            f"{curve} was given {name}={value}: it then turns, and its output does not tell its gradient. "
            f"Pass a positive {name}, or use torch.nn.functional.{curve}."
        )


SELU = _exponential_linear(
    "selu",
    F.selu,
    alpha=1.6732632423543772848170429916717,
    scale=1.0507009873554804934193349852946,
    source="Klambauer et al., Self-Normalizing Neural Networks, arXiv 1706.02515. Loses what `elu` loses",
)
RELU6 = _clamped("relu6", 0.0, 6.0)
LOG_SIGMOID = Monotone(
    name="log_sigmoid",
    f=F.logsigmoid,
    derivative=lambda x: torch.sigmoid(-x),
    of_output=lambda y: -torch.expm1(y),
    rise=lambda y: -torch.exp(y),
    source="log(sigmoid(x)), whose derivative is 1 - sigmoid(x); nothing is lost",
)
SOFTSIGN = Monotone(
    name="softsign",
    f=F.softsign,
    derivative=lambda x: 1 / (1 + x.abs()).square(),
    of_output=lambda y: (1 - y.abs()).square(),
    rise=lambda y: -2 * (1 - y.abs()) * y.sign(),
    source="x / (1 + |x|), Bergstra et al., 2009; f' is lost where y nears 1 or -1, from |x| = 1 on",
)
HARDSIGMOID = Monotone(
    name="hardsigmoid",
    f=F.hardsigmoid,
    derivative=lambda x: torch.where((x > -3) & (x < 3), torch.full_like(x, 1 / 6), 0.0),
    of_output=lambda y: torch.where((y > 0) & (y < 1), torch.full_like(y, 1 / 6), 0.0),
    rise=torch.zeros_like,
    needs_exact_output=True,
    source="relu6(x + 3) / 6, Courbariaux et al., arXiv 1511.00363; lost where y rounds to 1 although x is less than 3",
)
SQUARED_RELU = Monotone(
    name="squared_relu",
    f=_squared_relu,
    derivative=lambda x: 2 * x.clamp(min=0),
    of_output=lambda y: 2 * y.clamp(min=0).sqrt(),
    rise=lambda y: torch.where(y > 0, y.rsqrt(), 0.0),
    source="relu(x)^2, So et al., Primer, arXiv 2109.08668; lost where the square falls below the dtype's least number "
    "or grows beyond its largest",
)
# Stock PyTorch computes the derivatives of these three from their output already. They are here to be recognised where
# a model writes them out in other operations.
RELU = Monotone(
    name="relu",
    f=torch.relu,
    derivative=_one_above_zero,
    of_output=_one_above_zero,
    rise=torch.zeros_like,
    source="max(x, 0), Nair & Hinton, 2010",
)
SIGMOID = Monotone(
    name="sigmoid",
    f=torch.sigmoid,
    derivative=lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    of_output=lambda y: y * (1 - y),
    rise=lambda y: 1 - 2 * y,
    source="1 / (1 + exp(-x))",
)
TANH = Monotone(
    name="tanh",
    f=torch.tanh,
    derivative=lambda x: 1 / torch.cosh(x).square(),
    of_output=lambda y: 1 - y * y,
    rise=lambda y: -2 * y,
    source="tanh(x)",
)
FIXED = (SELU, RELU6, LOG_SIGMOID, SOFTSIGN, HARDSIGMOID, SQUARED_RELU, RELU, SIGMOID, TANH)


# --- the parameters, from values ----------------------------------------------------------------------

Values = Callable[[float], float]
"""f at one point, in float64."""


FAR = 1e6
"""Where a curve that levels out has done so."""


def guessed_elu(f: Values) -> Monotone | None:
    return elu(-f(-FAR)) if f(-FAR) < 0 else None


def guessed_celu(f: Values) -> Monotone | None:
    return celu(-f(-FAR)) if f(-FAR) < 0 else None


def guessed_leaky_relu(f: Values) -> Monotone | None:
    slope = -f(-1.0)
    return leaky_relu(slope) if slope > 0 and slope != 1 else None  # with 1 it is no activation at all


def guessed_hardtanh(f: Values) -> Monotone | None:
    low, high = f(-FAR), f(FAR)
    return hardtanh(low, high) if -FAR < low < high < FAR else None


def guessed_softplus(f: Values) -> Monotone | None:
    if not 0 < f(0.0) < math.inf:
        return None
    beta = math.log(2) / f(0.0)
    low, high = 0.0, SMOOTH_THRESHOLD / beta
    if f(math.nextafter(high, 0)) != math.nextafter(high, 0):
        return softplus(_without_rounding(beta))
    if f(1e-300) == 1e-300:
        return softplus(_without_rounding(beta), 0.0)
    while high - low > 1e-13 * high:  # where does y become x?
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) == middle else (middle, high)
    return softplus(_without_rounding(beta), _without_rounding(beta * high))


def _without_rounding(value: float) -> float:
    """0.7 rather than 0.7000000000000001, which arithmetic made of it; 1/3 stays."""
    short = float(f"{value:.10g}")
    return short if math.isclose(short, value, rel_tol=1e-12) else value


GUESSES = (guessed_leaky_relu, guessed_elu, guessed_celu, guessed_hardtanh, guessed_softplus)
