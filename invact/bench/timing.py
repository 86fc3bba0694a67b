"""Timing: contenders in turns, round by round, so that a machine that is busy for a while slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

GPU_RUNS = 10  # in one turn; their median is the turn's time; chosen
CACHE_BYTES = 1 << 28  # more than a GPU's cache holds, 50 MB on an H100


@dataclass
class Race:
    """The times of several contenders.

    Attributes:
        seconds: by contender, one number for every turn it has had. The first contender is what the others are
            compared with.

    Example:
        >>> race = Race({"stock": [1.0, 2.0, 4.0], "invact": [1.5, 2.0, 5.0]})
        >>> race.ratio("invact"), race.quartiles("invact")
        (1.25, (1.125, 1.375))
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def run(
        self, turns: Mapping[str, Callable[[], float]], rounds: int, on_turn: Callable[[str], None] = lambda name: None
    ) -> None:
        """Gives every contender a turn in every round, beginning with another each time.

        Args:
            turns: by contender, what takes a turn and returns its seconds.
            on_turn: called with the contender's name after every turn.
        """
        names = list(turns)
        self.seconds = {name: [] for name in names}
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                self.seconds[name].append(turns[name]())
                on_turn(name)

    @property
    def rounds(self) -> int:
        """How many are complete; turns of one that is not are left out of all figures."""
        return min((len(seconds) for seconds in self.seconds.values()), default=0)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][: self.rounds])

    def ratio(self, name: str, to: str | None = None) -> float:
        """The median over the rounds of this contender's time in a round by the other's in the same round."""
        return statistics.median(self.ratios(name, to))

    def ratios(self, name: str, to: str | None = None) -> list[float]:
        other = self.seconds[to or next(iter(self.seconds))]
        pairs = list(zip(self.seconds[name], other, strict=False))[: self.rounds]
        return [own / others for own, others in pairs]

    def quartiles(self, name: str) -> tuple[float, float]:
        """Between which the middle half of the ratios lie."""
        ratios = self.ratios(name)
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, method="inclusive")
        return low, high


# --- clocks: each runs `run` on what `prepare` gives, and leaves out the time that `prepare` takes -----------------


def wall_seconds(run: Callable[[Any], object], prepare: Callable[[], Any], device: torch.device) -> float:
    """From the call until the device has done what it asked for."""
    prepared = prepare()
    wait_for(device)
    start = time.perf_counter()
    run(prepared)
    wait_for(device)
    return time.perf_counter() - start


def kernel_seconds(run: Callable[[Any], object], prepare: Callable[[], Any], device: torch.device) -> float:
    """What the device itself takes: on a GPU between two events, with a cold cache."""
    if device.type != "cuda":
        return wall_seconds(run, prepare, device)
    cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(GPU_RUNS)]
    for start, end in pairs:
        prepared = prepare()
        cache.zero_()  # also keeps the GPU busy until the host has queued the run, whose own time is not meant
        start.record()
        run(prepared)
        end.record()
    wait_for(device)
    milliseconds: float = statistics.median(start.elapsed_time(end) for start, end in pairs)
    return milliseconds / 1000


def host_seconds(run: Callable[[Any], object], prepare: Callable[[], list[Any]], device: torch.device) -> float:
    """What a call of `run` takes until it returns, whether or not the device is done; the mean over what `prepare`
    gives."""
    prepared = prepare()
    wait_for(device)
    start = time.perf_counter()
    for item in prepared:
        run(item)
    seconds = time.perf_counter() - start
    wait_for(device)
    return seconds / len(prepared)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
