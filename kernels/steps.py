"""A curve's derivative as a step function of x with 2^k values: of all such, the nearest to f' where x ~ N(0, 1).

After Novikov et al., Few-bit Backward, arXiv 2202.00441: what is kept is on which step x lies, k bits. Nearest is meant
in the mean square, weighted with the density of N(0, 1) up to `FARTHEST`; beyond it the outermost steps go on.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .curve import Curve
from .own_thread import in_own_thread

KEPT_STEPS = 256  # a model has few curves, but a program may go through many parameters
FARTHEST = 8.0  # 1e-15 of N(0, 1) lies beyond it

# How the search narrows: cells of a grid over all of it, then ever fewer around what was found.
CELLS = 1 << 18
STRIDES = (256, 8, 1)  # in cells; the last is 6e-5
WINDOWS = (64, 32)  # of strides, to either side

NO_GAIN = 1e-12  # in the mean square: another step that gains less is left out
HALVINGS = 52


class Steps(NamedTuple):
    """A step function: `values[i]` where i of the `bounds` are at x or to the left of it.

    Attributes:
        bounds: rising, one fewer than values. Where fewer steps do as well, such as 2 of a LeakyReLU, the last are inf.
        values: 2^k of them.
    """

    bounds: tuple[float, ...]
    values: tuple[float, ...]


def steps(curve: Curve, bits: int) -> Steps:
    """The best steps for a curve, with 2^bits values; worked out once.

    Args:
        curve: one of `CURVES`, or one of the same kind with other parameters.
        bits: 1 to 4.

    Example:
        >>> from invact.kernels import CURVES
        >>> found = steps(CURVES["leaky_relu"], 1)
        >>> [round(value, 6) for value in found.values], round(found.bounds[0], 6)
        ([0.01, 1.0], 0.0)
    """
    return _steps(curve, bits)


@functools.lru_cache(KEPT_STEPS)
def _steps(curve: Curve, bits: int) -> Steps:
    def density(x: Tensor) -> Tensor:
        return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)

    return in_own_thread(lambda: best_steps(curve.derivative, density, 1 << bits, FARTHEST))


def best_steps(
    derivative: Callable[[Tensor], Tensor], density: Callable[[Tensor], Tensor], count: int, farthest: float
) -> Steps:
    """The step function of `count` values that is nearest to `derivative` between -farthest and farthest.

    Dynamic programming over the cells of a grid, which finds the best of all and not the nearest good one; then once
    more over the finer cells around each bound; and at last each bound goes to where the derivative crosses the
    middle of the values on its sides, as it does at the best.

    Args:
        derivative, density: of float64 tensors; the density need not be that of a whole.
    """
    sums = _Sums(derivative, density, farthest)
    edges = torch.arange(0, CELLS + 1, STRIDES[0])
    candidates = [edges[:1], *[edges] * (count - 1), edges[-1:]]
    for stride, window in zip(STRIDES[1:], WINDOWS, strict=True):
        best = _best_edges(candidates, sums)
        around = torch.arange(-window, window + 1) * stride
        candidates = [best[:1], *((edge + around).clamp(0, CELLS) for edge in best[1:-1]), best[-1:]]
    best = _best_edges(candidates, sums)
    values = sums.mean(best[:-1], best[1:])
    bounds = [
        _crossing(derivative, sums.position(edge), sums.width, (left + right) / 2)
        for edge, left, right in zip(best[1:-1].tolist(), values[:-1].tolist(), values[1:].tolist(), strict=True)
    ]
    missing = count - len(values)
    return Steps((*bounds, *[math.inf] * missing), (*values.tolist(), *[values[-1].item()] * missing))


class _Sums:
    """Over cells up to each edge: of the weights, of weighted derivatives, and of weighted squares."""

    def __init__(
        self, derivative: Callable[[Tensor], Tensor], density: Callable[[Tensor], Tensor], farthest: float
    ) -> None:
        self.width = 2 * farthest / CELLS
        self.farthest = farthest
        middles = (torch.arange(CELLS, dtype=torch.float64) + 0.5) * self.width - farthest
        weights, values = density(middles) * self.width, derivative(middles)
        self.weights, self.firsts, self.squares = (
            torch.cat([torch.zeros(1, dtype=torch.float64), (weights * powers).cumsum(0)])
            for powers in (torch.ones_like(values), values, values * values)
        )

    def position(self, edge: int) -> float:
        return edge * self.width - self.farthest

    def mean(self, start: Tensor, end: Tensor) -> Tensor:
        """Of the derivative, between edges."""
        return (self.firsts[end] - self.firsts[start]) / (self.weights[end] - self.weights[start]).clamp(min=1e-300)

    def error(self, start: Tensor, end: Tensor) -> Tensor:
        """What one step between edges costs, in the mean square; infinite if it would end before it starts."""
        firsts = self.firsts[end] - self.firsts[start]
        error = self.squares[end] - self.squares[start] - firsts * self.mean(start, end)
        return torch.where(end < start, torch.inf, error.clamp(min=0))


def _best_edges(candidates: list[Tensor], sums: _Sums) -> Tensor:
    """One of each edge's candidates, so that the steps between them cost least; no more edges than gain anything."""
    totals = [torch.zeros(1, dtype=torch.float64)]
    came_from: list[Tensor] = []
    ends: list[Tensor] = []  # what it costs if the step after so many edges is the last
    last = candidates[-1]
    for before, now in itertools.pairwise(candidates[:-1]):
        ends.append(totals[-1] + sums.error(before, last))
        total, source = (totals[-1][:, None] + sums.error(before[:, None], now[None, :])).min(0)
        totals.append(total)
        came_from.append(source)
    ends.append(totals[-1] + sums.error(candidates[-2], last))
    least = [end.min().item() for end in ends]
    used = next(number for number, cost in enumerate(least) if cost <= min(least) + NO_GAIN)
    chosen = int(ends[used].argmin())
    edges = [last[0]]
    for number in range(used, 0, -1):
        edges.append(candidates[number][chosen])
        chosen = int(came_from[number - 1][chosen])
    return torch.stack([*edges, candidates[0][0]][::-1])


def _crossing(derivative: Callable[[Tensor], Tensor], near: float, width: float, level: float) -> float:
    """The first number next to `near` where the derivative is beyond `level`; `near` itself where it does not cross it.

    A jump is found to the last digit: what lies right before it is on the left step.
    """

    def is_above(x: float) -> bool:
        return derivative(torch.tensor([x], dtype=torch.float64)).item() > level

    low, high = near - width, near + width
    at_first = is_above(low)
    if is_above(high) == at_first:
        return near
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_above(middle) == at_first else (low, middle)
    return high
