"""The states of random number generators: of Python, numpy and torch, noted and put back."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class NotedGenerator:
    """How far one generator of random numbers has come."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    state: Any

    def put_back(self) -> None:
        if not _same(self.get(), self.state):
            self.set(self.state)


def global_generators() -> list[NotedGenerator]:
    """Those that all code shares: Python's, numpy's if it is loaded, torch's for the CPU and for each GPU in use."""
    found = [_noted(random.getstate, random.setstate)]
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        found.append(_noted(lambda: numpy.get_state(legacy=False), numpy.set_state))
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return found + [_noted(each.get_state, each.set_state) for each in (torch.default_generator, *gpus)]


def generator_of(value: Any) -> NotedGenerator | None:
    """`value`, if it is a generator of random numbers that somebody holds, else None."""
    if isinstance(value, torch.Generator):
        return _noted(value.get_state, value.set_state)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _noted(value.getstate, value.setstate)
    numpy = sys.modules.get("numpy.random")
    if numpy is None:
        return None
    if isinstance(value, numpy.RandomState):
        return _noted(lambda: value.get_state(legacy=False), value.set_state)
    if isinstance(value, numpy.Generator):
        value = value.bit_generator
    if isinstance(value, numpy.BitGenerator):
        return _noted(lambda: value.state, lambda state: setattr(value, "state", state))
    return None


def _noted(get: Callable[[], Any], set_: Callable[[Any], Any]) -> NotedGenerator:
    return NotedGenerator(get, set_, get())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other)
