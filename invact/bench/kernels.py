"""Single activations timed: forward, backward and both, and what the host takes to call them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invact.bench.contenders import INVACT, STOCK, Activation, activations
from invact.bench.records import COPY, KernelTimes
from invact.bench.result import Bench
from invact.bench.timing import host_seconds, kernel_seconds, wait_for
from invact.ledger.kept_storages import KeptStorages
from invact.ledger.storages import storage_sizes

HOST_ELEMENTS = 1024  # so few that the host is what takes the time
HOST_CALLS = 100  # in a turn: chosen, a few milliseconds


def time_kernels(
    bench: Bench,
    curves: Sequence[str],
    dtypes: Sequence[torch.dtype],
    *,
    elements: int,
    rounds: int,
    against: Sequence[str],
    device: torch.device,
    with_copy: bool,
    on_turn: Callable[[str], None] = lambda what: None,
) -> None:
    """Adds the times of every curve in every dtype to `bench`, as far as it comes.

    Args:
        curves: keys of `invact.kernels.CURVES`.
        elements: of the tensors; when host time is taken `HOST_ELEMENTS`.
        against: names of `invact.bench.contenders.NAMES`.
        with_copy: a copy within the device's memory takes turns as well, for comparison.
        on_turn: called after every turn, with what it was.
    """
    for curve in curves:
        for dtype in dtypes:
            for count, passes in ((elements, _PASSES), (HOST_ELEMENTS, _HOST_PASSES)):
                field = _Field(curve, dtype, count, device)
                field.enter(activations(curve, against), bench, on_turn)
                for name in passes:
                    field.time(bench, name, rounds, with_copy and passes is _PASSES, on_turn)


class _Field:
    """The contenders for one curve on one tensor."""

    def __init__(self, curve: str, dtype: torch.dtype, elements: int, device: torch.device) -> None:
        self.curve, self.dtype, self.elements, self.device = curve, dtype, elements, device
        generator = torch.Generator(device).manual_seed(0)
        self.x, self.dy = (torch.randn(elements, generator=generator, device=device).to(dtype) for _ in range(2))
        self.x.requires_grad_()
        self.contenders: dict[str, Activation] = {}
        self.kept_bytes: dict[str, int] = {}
        self.kept_besides_output_bytes: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}
        self.moved_bytes: dict[str, dict[str, int]] = {}  # by contender and pass

    def enter(
        self, candidates: dict[str, Callable[[], Activation]], bench: Bench, on_turn: Callable[[str], None]
    ) -> None:
        """Lets each run once, which warms it up, and notes what it keeps; who fails is left out and said so."""
        for name, make in candidates.items():
            on_turn(f"{self.curve}: {name}, warming up")
            try:
                activation = make()
                self._measure_memory(name, activation)
            except Exception as error:
                if name in (STOCK, INVACT):
                    raise
                bench.leave_out(f"{name} for {self.curve}", error)
            else:
                self.contenders[name] = activation

    def time(self, bench: Bench, name: str, rounds: int, with_copy: bool, on_turn: Callable[[str], None]) -> None:
        times = KernelTimes(
            curve=self.curve,
            dtype=str(self.dtype).removeprefix("torch."),
            passed=name,
            elements=self.elements,
            kept_bytes=self.kept_bytes,
            kept_besides_output_bytes=self.kept_besides_output_bytes,
            peak_bytes=self.peak_bytes,
            moved_bytes={who: moved[name] for who, moved in self.moved_bytes.items() if name in moved},
        )
        bench.kernels.append(times)
        turns = {who: self._turn(activation, name) for who, activation in self.contenders.items()}
        if with_copy:
            turns[COPY] = self._copy(times.moved_bytes[INVACT])
        times.race.run(turns, rounds, lambda who: on_turn(f"{self.curve} {times.dtype}, {name}: {who}"))

    def _measure_memory(self, name: str, activation: Activation) -> None:
        self._gradient(activation(self.x))  # whatever the first call alone does is done now
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._gradient(activation(self.x))
            self.peak_bytes[name] = torch.cuda.max_memory_allocated(self.device) - before
        with KeptStorages() as kept:
            y = activation(self.x)
        output = storage_sizes(y)
        x_and_y = storage_sizes(self.x) | output
        gradients = 2 * self.dy.nbytes
        forward = sum((x_and_y | kept.sizes()).values())
        backward = kept.nbytes() + gradients
        self.kept_bytes[name] = kept.nbytes()
        self.kept_besides_output_bytes[name] = sum(size for key, size in kept.sizes().items() if key not in output)
        self.moved_bytes[name] = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}

    def _gradient(self, y: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(y, self.x, self.dy)
        return dx

    def _turn(self, activation: Activation, name: str) -> Callable[[], float]:
        run: Callable[[Any], object]
        prepare: Callable[[], Any]
        if name in (FORWARD, HOST_FORWARD):
            run, prepare = (lambda x: activation(x)), (lambda: self.x)
        elif name in (BACKWARD, HOST_BACKWARD):
            run, prepare = self._gradient, (lambda: activation(self.x))
        else:
            run, prepare = (lambda x: self._gradient(activation(x))), (lambda: self.x)
        if name in _PASSES:
            return partial(kernel_seconds, run, prepare, self.device)
        return partial(host_seconds, run, lambda: [prepare() for _ in range(HOST_CALLS)], self.device)

    def _copy(self, moved_bytes: int) -> Callable[[], float]:
        """A copy that moves as much: it reads half of that and writes the other half."""
        source = torch.empty(moved_bytes // 2, dtype=torch.uint8, device=self.device).random_()
        return partial(kernel_seconds, source.copy_, partial(torch.ones_like, source), self.device)


FORWARD, BACKWARD, BOTH = _PASSES = ("forward", "backward", "forward + backward")
HOST_FORWARD, HOST_BACKWARD = _HOST_PASSES = ("forward, host", "backward, host")
