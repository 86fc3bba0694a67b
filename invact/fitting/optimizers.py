"""What an optimizer holds besides the parameters, and what its step allocates: it is run on simulated tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW, Optimizer

from invact.errors.own_errors import first_line
from invact.fitting.lifetimes import Lifetimes, levels
from invact.ledger.storages import storage_sizes
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import item_operator

OptimizerLike: TypeAlias = str | Optimizer

Make: TypeAlias = Callable[[list[nn.Parameter], bool], Optimizer]


class AdamW8bit(Optimizer):
    """Holds what bitsandbytes' AdamW8bit does, and computes nothing: its step is one kernel, in place.

    Two bytes a parameter and two fp32 scales for each block of 256; parameters of fewer than 4096 elements have states
    in fp32 (bitsandbytes, optim/optimizer.py: `min_8bit_size`, `blocksize`).
    """

    _BLOCK = 256
    _SMALLEST = 4096

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    self._add_states(p)

    def _add_states(self, p: Tensor) -> None:
        state = self.state[p]
        for number in (1, 2):
            if p.numel() < self._SMALLEST:
                state[f"state{number}"] = torch.zeros_like(p, dtype=torch.float32)
            else:
                state[f"state{number}"] = torch.zeros_like(p, dtype=torch.uint8)
                state[f"absmax{number}"] = p.new_zeros(-(-p.numel() // self._BLOCK), dtype=torch.float32)


# `at_once`: all parameters in one call, as is PyTorch's default on a GPU; it takes temporaries for all of them.
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda parameters, at_once: AdamW(parameters, foreach=at_once),
    "adamw-fused": lambda parameters, at_once: AdamW(parameters, fused=True),
    "adamw-8bit": lambda parameters, at_once: AdamW8bit(parameters),
    "adafactor": lambda parameters, at_once: Adafactor(parameters, foreach=at_once),
    "momentum": lambda parameters, at_once: SGD(parameters, momentum=0.9, foreach=at_once),
    "sgd": lambda parameters, at_once: SGD(parameters, foreach=at_once),
}
"""By name; "none" stands for gradients without an optimizer. States have their parameters' dtype, as PyTorch's."""


class NotSimulatedError(ValueError):
    """A training step, or an optimizer's, that can not run on simulated tensors."""


NONE = "none"
NAMES = (*OPTIMIZERS, NONE)


def check_optimizer(optimizer: Any) -> None:
    if isinstance(optimizer, Optimizer):
        return
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer is of type {type(optimizer).__name__}, but must be a name or a torch.optim.Optimizer. "
            f"Pass one of {', '.join(NAMES)}."
        )
    if optimizer not in NAMES:
        raise ValueError(f"There is no optimizer {optimizer!r} here. Pass one of {', '.join(NAMES)}, or your own.")


def as_counted(optimizer: Any) -> OptimizerLike:
    """The optimizer of a Trainer as it can be counted: out of the wrappers of accelerate and Lightning.

    Of bitsandbytes' 8-bit AdamW only the name can be run on simulated tensors; of what is not there yet AdamW is taken.
    """
    while not isinstance(optimizer, Optimizer) or type(optimizer).__module__.partition(".")[0] == "accelerate":
        if not hasattr(optimizer, "optimizer"):
            return "adamw"
        optimizer = optimizer.optimizer
    kind = type(optimizer)
    if kind.__module__.partition(".")[0] == "bitsandbytes" and kind.__name__.endswith("AdamW8bit"):
        return "adamw-8bit"
    return optimizer


@dataclass(frozen=True)
class Held:
    """Bytes of an optimizer: between steps, and at the most in a step besides that."""

    states: int
    temporary: int


def held_by(optimizer: OptimizerLike, simulated: Mapping[nn.Parameter, nn.Parameter], device: torch.device) -> Held:
    """Runs two steps of the optimizer on simulated parameters: the first makes its states, the second is watched.

    Args:
        optimizer: a name, or one of the user's, of whose kind and with whose groups of parameters another is made.
        simulated: what stands for each of the model's parameters that takes a gradient; none has one afterwards.
        device: that is planned for.
    """
    if optimizer == NONE or not simulated:
        return Held(0, 0)
    parameters = list(simulated.values())
    try:
        with Lifetimes() as lifetimes, _NumbersToldAsOne():
            made = _made(optimizer, simulated, device.type == "cuda")
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
            made.step()
            began = lifetimes.now
            made.step()
    except Exception as error:
        name = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
        raise NotSimulatedError(
            f"What {name} holds can not be told, since another one like it does not run on simulated tensors: "
            f"{type(error).__name__}: {first_line(error)}. Pass the name of the nearest: {', '.join(NAMES)}."
        ) from error
    states = [value for state in made.state.values() for value in state.values() if isinstance(value, Tensor)]
    for parameter in parameters:
        parameter.grad = None
    freed_again = (a for a in lifetimes.allocations() if a.born >= began and a.died <= lifetimes.now)
    alive = levels(((a.nbytes, a.born, a.died) for a in freed_again), lifetimes.now)
    return Held(_bytes_of(states), max(alive))


class _NumbersToldAsOne(TorchDispatchMode):
    """Adafactor asks its tensors for a number, which simulated ones do not have; what is allocated is the same."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return 1 if func is item_operator else func(*args, **(kwargs or {}))


def _made(optimizer: OptimizerLike, simulated: Mapping[nn.Parameter, nn.Parameter], at_once: bool) -> Optimizer:
    if isinstance(optimizer, str):
        return OPTIMIZERS[optimizer](list(simulated.values()), at_once)
    kind: Callable[..., Optimizer] = type(optimizer)
    takes = inspect.signature(kind).parameters

    def taken(settings: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in settings.items() if name in takes and name != "params"}
        if at_once and not found.get("fused") and found.get("foreach", False) is None:
            found["foreach"] = True
        return found

    groups = [
        {**taken(group), "params": [simulated[p] for p in group["params"] if p in simulated]}
        for group in optimizer.param_groups
    ]
    groups = [group for group in groups if group["params"]]
    parameters: list[Any] = groups if groups else [*simulated.values()]
    return kind(parameters, **taken(optimizer.defaults))


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({key: nbytes for tensor in tensors for key, nbytes in storage_sizes(tensor).items()}.values())
