"""Which curve a module computes, told from what it does and never from its class name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from invact.kernels import CURVES

# Stock PyTorch computes the derivative of these from their output, so there is nothing to invert.
KEPT_BY_OUTPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

# Modules that compute inside in float32 are off by about 1e-7; the closest pair of curves, GELU and
# its tanh form, differ by 4.7e-4.
_TOLERANCE = 2e-6

_EVERY_MODULE_HAS = frozenset(nn.Module().__dict__)


def recognise(module: nn.Module) -> str | None:
    """The name of the curve that `module` computes, or None if it is no pointwise activation.

    A leaf without parameters or buffers is evaluated in float64 on the CPU, on a copy, over several grids
    of different shapes and neighbours, in training and in evaluation mode. It is recognised when every
    result is the same known curve of each element alone and nothing about the module has changed.

    Example:
        >>> recognise(torch.nn.GELU(approximate="tanh"))
        'gelu_tanh'
        >>> recognise(torch.nn.Softmax(dim=-1)) is None
        True
    """
    if not _is_stateless_leaf(module):
        return None
    try:
        bare = _copy_without_hooks(module)
        state = _own_state(bare)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
            samples = _samples(bare)
        changed = _own_state(bare) != state
    except Exception:  # whatever a module raises on a plain tensor, it is not a pointwise activation
        return None
    if changed or not samples:
        return None
    for name, curve in _catalogue().items():
        if all(_agree(curve(x), y) for x, y in samples):
            return name
    return None


def _catalogue() -> dict[str, Callable[[Tensor], Tensor]]:
    return {**{name: curve.f for name, curve in CURVES.items()}, **KEPT_BY_OUTPUT}


def _is_stateless_leaf(module: nn.Module) -> bool:
    members = (module.children(), module.parameters(recurse=False), module.buffers(recurse=False))
    return not any(next(iter(kind), None) is not None for kind in members)


def _copy_without_hooks(module: nn.Module) -> nn.Module:
    bare = copy.copy(module)
    bare.__dict__.update({name: none for name, none in nn.Module().__dict__.items() if "hook" in name})
    return copy.deepcopy(bare)


def _own_state(module: nn.Module) -> str:
    # repr sees counters, flags and small tensors alike; the training flag is ours to set.
    return repr({k: v for k, v in module.__dict__.items() if k not in _EVERY_MODULE_HAS})


def _grids() -> list[Tensor]:
    """float64 grids whose elements have other neighbours, means and shapes from one to the next."""
    generator = torch.Generator().manual_seed(0)
    far = torch.tensor([-1e3, -100.0, -30.0, 30.0, 100.0, 1e3, 0.0, -0.0], dtype=torch.float64)
    near = torch.linspace(-11.0, 13.0, 184, dtype=torch.float64)
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
            samples.append((grid, module.train().forward(grid.clone())))
        except Exception:  # some modules want images, others sequences
            continue
        samples.append((grid, module.eval().forward(grid.clone())))
        samples.append((grid, module.train().forward(grid.clone())))
    return samples


def _agree(expected: Tensor, y: object) -> bool:
    if not isinstance(y, Tensor) or y.shape != expected.shape or not y.is_floating_point():
        return False
    return torch.allclose(y.double(), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
