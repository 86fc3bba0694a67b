"""How much forward computes and moves, by the moment: what it takes to run a part of it once more."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import flop_registry

from invact.errors.own_errors import users_call
from invact.fitting.lifetimes import Lifetimes
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import device_query

FLOPS_A_BYTE = 100
"""How many operations a GPU does while it moves a byte: 400 Tflop/s of its 16-bit products and 3 to 4 TB/s are what an
H100 reaches. Rounded, since only ratios between blocks of one model are taken of it."""


class Work(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention, as PyTorch's flop counter does."""

    def __init__(self, clock: Lifetimes) -> None:
        super().__init__()
        self._clock = clock
        self._flops: list[tuple[int, int]] = []  # moment, operations

    def flops(self, span: tuple[int, int]) -> int:
        """Operations from one moment up to another."""
        return sum(flops for moment, flops in self._flops if span[0] <= moment < span[1])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is device_query:
            return args[0].device
        out = users_call(func, *args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self._flops.append((self._clock.now, count(*args, **(kwargs or {}), out_val=out)))
        return out
