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

from ..curves.curve import Curve
from ..own_thread import in_own_thread

KEPT_STEPS = 256  # a model has few curves, but a program may go through many parameters
FARTHEST = 8.0  # 1e-15 of N(0, 1) lies beyond it

# How the search narrows: cells of a grid over all of it, then ever fewer around what was found.
CELLS = 1 << 18
STRIDES = (256, 8, 1)  # in cells; the last is 6e-5
WINDOWS = (64, 32)  # of strides, to either side

NO_GAIN = 1e-12  # in the mean square: another step that gains less is left out
HALVINGS = 112  # of two cells, to the least number of fp32 that is not denormal: a jump at 0 is right behind it


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
    best = _without_idle(_best_edges(candidates, sums), sums)
    values = sums.mean(best[:-1], best[1:])
    bounds = _crossings(derivative, sums.position(best[1:-1]), sums.width, (values[:-1] + values[1:]) / 2)
    missing = count - len(values)
    return Steps((*bounds.tolist(), *[math.inf] * missing), (*values.tolist(), *[values[-1].item()] * missing))


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

    def position(self, edge: Tensor) -> Tensor:
        return edge.double() * self.width - self.farthest

    def mean(self, start: Tensor, end: Tensor) -> Tensor:
        """Of the derivative, between edges."""
        return (self.firsts[end] - self.firsts[start]) / (self.weights[end] - self.weights[start]).clamp(min=1e-300)

    def error(self, start: Tensor, end: Tensor) -> Tensor:
        """What one step between edges costs, in the mean square; infinite if it would end before it starts."""
        firsts = self.firsts[end] - self.firsts[start]
        error = self.squares[end] - self.squares[start] - firsts * self.mean(start, end)
        return torch.where(end < start, torch.inf, error.clamp(min=0))


def _best_edges(candidates: list[Tensor], sums: _Sums) -> Tensor:
    """One of each edge's candidates, so that the steps between them cost least together."""
    total = torch.zeros(1, dtype=torch.float64)
    came_from: list[Tensor] = []
    cost, its_own = torch.empty(0), None
    for before, now in itertools.pairwise(candidates):
        if its_own is None or its_own[0] is not before or its_own[1] is not now:  # at first most have the same
            cost, its_own = sums.error(before[:, None], now[None, :]), (before, now)
        total, source = (total[:, None] + cost).min(0)
        came_from.append(source)
    chosen = 0  # of the last edge there is one candidate
    edges = [candidates[-1][chosen]]
    for candidate, source in zip(candidates[-2::-1], came_from[::-1], strict=True):
        chosen = int(source[chosen])
        edges.append(candidate[chosen])
    return torch.stack(edges[::-1])


def _without_idle(edges: Tensor, sums: _Sums) -> Tensor:
    """The edges without those between steps that would do as well as one."""
    while len(edges) > 2:
        before, here, after = edges[:-2], edges[1:-1], edges[2:]
        gains = sums.error(before, after) - sums.error(before, here) - sums.error(here, after)
        if gains.min() > NO_GAIN:
            break
        idle = int(gains.argmin()) + 1
        edges = torch.cat([edges[:idle], edges[idle + 1 :]])
    return edges


def _crossings(derivative: Callable[[Tensor], Tensor], near: Tensor, width: float, levels: Tensor) -> Tensor:
    """The first numbers next to `near` where the derivative has crossed its level; `near` itself where it does not.

    A jump is found to the last digit: what lies right before it is on the left step.
    """
    low, high = near - width, near + width
    at_first = derivative(low) > levels
    crosses = (derivative(high) > levels) != at_first
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        before = (derivative(middle) > levels) == at_first
        low, high = torch.where(before, middle, low), torch.where(before, high, middle)
    return torch.where(crosses, high, near)
