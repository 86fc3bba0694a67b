"""Which curve a module computes, told from what it does and never from its class name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invact.kernels import FIXED_CURVES, GUESSES, Curve
from invact.recognition.bare_copies import RaisedError, bare_copy, output_of, state_of

# Modules that compute inside in float32 are off by about 1e-7; the closest pair of curves, GELU and
# its tanh form, differ by 4.7e-4.
_TOLERANCE = 2e-6
_SLOPE_TOLERANCE = 1e-5  # of f'; the closest pair differs by 1e-3


def recognise(module: nn.Module) -> Curve | None:
    """The curve that `module` computes, with its parameters, or None if it is no pointwise activation.

    A leaf without parameters or buffers is evaluated in float64 on the CPU, as a copy, over several grids
    of different shapes and neighbours, in training and in evaluation mode. It is recognised when every
    result is the same known curve of each element alone, its gradient is that of the curve (a straight-through
    estimator's is not) and nothing about the module has changed.

    Example:
        >>> recognise(torch.nn.GELU(approximate="tanh"))
        gelu_tanh
        >>> recognise(torch.nn.ELU(alpha=0.7))
        elu(alpha=0.7)
        >>> recognise(torch.nn.Softmax(dim=-1)) is None
        True
    """
    if not _is_stateless_leaf(module):
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        bare = bare_copy(module)
        state = state_of(bare)
        try:
            samples = _samples(bare)
            found = next(_agreeing(samples, bare), None) if samples else None
        except RaisedError:
            return None
        return None if found is None or state is None or state_of(bare) != state else found


@dataclass(frozen=True)
class Rounding:
    """Relative L2 errors against float64, over x ~ N(0, 1), of a module's own steps and of its curve rounded once."""

    own: float
    once: float


def own_rounding(module: nn.Module, curve: Curve, dtype: torch.dtype) -> Rounding | None:
    """How a module that computes `curve` in several rounded steps differs from the curve, or None if it does not.

    Example:
        >>> from transformers.activations import NewGELUActivation
        >>> own_rounding(torch.nn.GELU(), recognise(torch.nn.GELU()), torch.bfloat16) is None
        True
        >>> steps = own_rounding(NewGELUActivation(), recognise(NewGELUActivation()), torch.bfloat16)
        >>> steps.own > steps.once
        True
    """
    x = torch.randn(4, 16, 16, 16, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)
    with torch.no_grad(), torch.device("cpu"):
        steps, once, exact = output_of(bare_copy(module), x.clone()), curve.f(x), curve.f(x.double())
    if torch.equal(steps, once):
        return None
    own_error, once_error = (((y.double() - exact).norm() / exact.norm()).item() for y in (steps, once))
    return Rounding(own_error, once_error)


def _is_stateless_leaf(module: nn.Module) -> bool:
    members = (module.children(), module.parameters(recurse=False), module.buffers(recurse=False))
    return not any(next(iter(kind), None) is not None for kind in members)


def _grids() -> list[Tensor]:
    """float64 grids whose elements have other neighbours, means and shapes from one to the next."""
    generator = torch.Generator().manual_seed(0)
    # 1e6 is beyond the largest fp16, where some clamp.
    far = torch.tensor([-1e6, -1e3, -100.0, -30.0, 30.0, 100.0, 1e3, 1e6, 0.0, -0.0], dtype=torch.float64)
    near = torch.linspace(-11.0, 13.0, 182, dtype=torch.float64)
    values = torch.cat([far, near])
    shuffled = values[torch.randperm(len(values), generator=generator)]
    positive = values.abs()
    return [values, shuffled.view(2, 96), positive.view(4, 6, 8), shuffled.flip(0).view(2, 4, 4, 6)]


def _samples(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(x, module(x)) for every grid whose shape the module takes, in training and evaluation mode."""
    samples = []
    for grid in _grids():
        # In-place activations change their argument, so each call gets one of its own.
        try:
            samples.append((grid, output_of(module, grid.clone())))
        except RaisedError:  # some modules want images, others sequences
            continue
        samples.append((grid, output_of(module, grid.clone(), training=False)))
        samples.append((grid, output_of(module, grid.clone())))
    return samples


def _agreeing(samples: list[tuple[Tensor, Tensor]], module: nn.Module) -> Iterator[Curve]:
    """The curves that agree with every sample: those that have no parameters first, then those with guessed ones."""
    if not all(_is_plain(x, y) for x, y in samples):
        return
    shape = samples[0][0].shape
    values = _values(module, shape)
    for curve in (*FIXED_CURVES, *_guessed(values)):
        if all(_agree(curve.f(x), y) for x, y in samples) and _has_slope_of(curve, module, shape):
            yield curve


def _guessed(values: Callable[[float], float]) -> Iterator[Curve]:
    for guess in GUESSES:
        try:
            curve = guess(values)
        except ValueError:  # no such curve has these parameters: the module gives another value at each call
            continue
        if curve is not None:
            yield curve


def _values(module: nn.Module, shape: torch.Size) -> Callable[[float], float]:
    """The module as a function of one number."""

    def value(at: float) -> float:
        y: Tensor = output_of(module, torch.full(shape, at, dtype=torch.float64))
        result: float = y.flatten()[0].item()
        return result

    return value


def _has_slope_of(curve: Curve, module: nn.Module, shape: torch.Size) -> bool:
    """Whether autograd gives f' for the module, away from kinks, where one side is as good as the other."""
    x = torch.linspace(-10.93, 11.07, shape.numel(), dtype=torch.float64).view(shape)
    with torch.enable_grad():
        # a copy, since an in-place activation may not change a leaf
        y = output_of(module, x.requires_grad_().clone())
        try:
            (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        except Exception:  # it passes no gradient on, or its own backward raises
            return False
    return torch.allclose(slope, curve.derivative(x.detach()), rtol=_SLOPE_TOLERANCE, atol=_SLOPE_TOLERANCE)


def _is_plain(x: Tensor, y: object) -> bool:
    return isinstance(y, Tensor) and y.shape == x.shape and y.is_floating_point()


def _agree(expected: Tensor, y: Tensor) -> bool:
    return torch.allclose(y.double(), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
