"""Part "steps": whole training steps, forward, loss and backward, in several ways that take turns in one process."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from card_models import batch_of, model_and_inputs
from record import Record
from torch import Tensor, nn
from ways import COMPILE, COMPILE_INVACT, INVACT, STOCK, Stepper, difference, eager_ways

from invact.planning import Decided, decide
from invact.sizes import size_in_words
from invact.timing import Race

SECONDS_TO_COMPILE = 45  # for each of the two ways
SECONDS_OF_TURNS = 6.0


def measure(item: str, record: Record, tiny: bool) -> None:
    """Item: a key of `card_models.SPECS`, with "-compiled" after it for stock and the compiled ways alone."""
    start = time.perf_counter()
    short, _, compiled = item.partition("-")
    model, inputs_of = model_and_inputs(short, tiny)
    inputs = inputs_of(batch_of(short, tiny))
    decided = decide(model, inputs)
    report = decided.report
    found: dict[str, Any] = {
        "inputs": size_in_words(inputs),
        "dtype": str(next(model.parameters()).dtype),
        "sites": len(report.sites),
        "inverted": len(report.inverted),
        "report_bytes_before": report.bytes_before,
        "report_bytes_after": report.bytes_after,
        "ways": {},
        "seconds_to_build_and_plan": time.perf_counter() - start,
    }
    stepper = Stepper(model, model, inputs)
    ways = {name: way for name, way in eager_ways(model, decided).items() if name == STOCK or not compiled}
    turns = {name: _Turn(stepper, way) for name, way in ways.items()}
    stock = stepper.gradients(ways[STOCK])
    for name, turn in list(turns.items()):
        _warm_up(name, turn, stock, turns, found)
        record[item] = found
    del stock
    if compiled:
        turns |= _compiled(model, inputs, decided, found, "aot_eager" if tiny else "inductor")
    _race(turns, found, tiny)
    record[item] = found


class _Turn:
    """One way of one stepper: called, it takes a step and returns the seconds."""

    def __init__(self, stepper: Stepper, way: Any) -> None:
        self.stepper, self.way = stepper, way
        self.peak_bytes = 0

    def __call__(self) -> float:
        seconds = self.stepper.seconds(self.way)
        self.peak_bytes = self.stepper.peak_bytes
        return seconds


def _warm_up(
    name: str, turn: _Turn, stock: list[Tensor | None], turns: dict[str, _Turn], found: dict[str, Any]
) -> None:
    """Takes the first steps, compares the gradients; a way that fails is left out and says why."""
    try:
        found["ways"][name] = {"gradients_off": difference(turn.stepper.gradients(turn.way), stock)}
        turn()
    except Exception as error:
        if name in (STOCK, INVACT):
            raise
        turn.stepper.model.zero_grad()
        del turns[name]
        found["ways"][name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}


def _race(turns: dict[str, _Turn], found: dict[str, Any], tiny: bool) -> None:
    once = sum(turn() for turn in turns.values())
    rounds = 2 if tiny else max(5, min(15, int(SECONDS_OF_TURNS / once)))
    race = Race()
    race.run(turns, rounds)
    for name, turn in turns.items():
        measured = {
            "seconds": race.median(name),
            "ratio": race.ratio(name),
            "quartiles": race.quartiles(name),
            "rounds": race.rounds,
            "peak_bytes": turn.peak_bytes,
        }
        found["ways"][name] = found["ways"].get(name, {}) | measured


def _compiled(model: nn.Module, inputs: Any, decided: Decided, found: dict[str, Any], backend: str) -> dict[str, _Turn]:
    """Two copies of the model, compiled: the one as it is, the other inverted. Dropout is the compiler's own, so the
    inverted one is compared with the other."""
    turns: dict[str, _Turn] = {}
    stock: list[Tensor | None] = []
    for name in (COMPILE, COMPILE_INVACT):
        try:
            start = time.perf_counter()
            own = copy.deepcopy(model)
            if name == COMPILE_INVACT:
                decided.apply(own)
            stepper = Stepper(torch.compile(own, backend=backend), own, inputs)
            with _at_most(SECONDS_TO_COMPILE):
                gradients = stepper.gradients()
            off = difference(gradients, stock) if stock else None
            stock = stock or gradients
            turns[name] = _Turn(stepper, nullcontext)
            turns[name]()
            found["ways"][name] = {"gradients_off": off, "seconds_to_compile": time.perf_counter() - start}
        except Exception as error:
            turns.pop(name, None)
            found["ways"][name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
    return turns


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    """Raises TimeoutError in this thread when the time is over, whatever it does in Python."""

    def end(*_: object) -> None:
        raise TimeoutError(f"not compiled after {seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
