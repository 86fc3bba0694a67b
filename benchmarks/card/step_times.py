"""Part "steps": whole training steps, forward, loss and backward, in several ways that take turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from card_models import DEVICE, SPECS, batch_of, model_and_inputs
from profiles import kernels_beside
from record import Record
from steppers import Stepper, difference, times
from torch import Tensor, nn
from verdicts import verdict_on_steps
from ways import EXACT, INVACT, STOCK, eager_ways

from invact.bench.timing import Race
from invact.bench.ways import Way
from invact.report.inputs import size_in_words

SECONDS_OF_TURNS = 5.0
FEWEST_ROUNDS, MOST_ROUNDS = 5, 15


def prepare(item: str, tiny: bool) -> dict[str, Any] | None:
    """A stepper for every way, planned and patched; None where the model's library is not here."""
    if item == "openclip" and find_spec("open_clip") is None:
        return None
    start = time.perf_counter()
    model, inputs_of = model_and_inputs(SPECS[item], tiny)
    inputs = inputs_of(batch_of(SPECS[item], tiny))
    steppers, errors = made(model, inputs, eager_ways(model))
    seconds = time.perf_counter() - start
    return {"inputs": inputs, "steppers": steppers, "errors": errors, "seconds": seconds}


def measure(item: str, record: Record, tiny: bool, prepared: dict[str, Any] | None) -> None:
    """Item: a key of `card_models.SPECS`."""
    if prepared is None:
        record[item] = {"absent": "its library is not installed"}
        return
    steppers: dict[str, Stepper] = prepared["steppers"]
    found: dict[str, Any] = {
        "inputs": size_in_words(prepared["inputs"]),
        "dtype": str(next(steppers[STOCK].model.parameters()).dtype),
        "seconds_to_prepare": prepared["seconds"],
        "ways": {way: _planned(stepper) for way, stepper in steppers.items()} | prepared["errors"],
    }
    stock = steppers[STOCK].gradients()
    for name in list(steppers):
        warm_up(name, steppers, stock, found["ways"])
        record[item] = found
    del stock
    race(steppers, found["ways"], tiny, lambda: record.__setitem__(item, found))
    found["verdict"] = verdict_on_steps(item, found["ways"])
    record[item] = found
    if DEVICE.type == "cuda" or tiny:
        found["profile"] = kernels_beside(steppers)
        record[item] = found


def made(model: nn.Module, inputs: Any, ways: Mapping[str, Way]) -> tuple[dict[str, Stepper], dict[str, Any]]:
    """Steppers by way, and why others can not be; stock and invact must."""
    steppers, errors = {}, {}
    for name, way in ways.items():
        try:
            steppers[name] = Stepper(model, inputs, way)
        except Exception as error:
            if name in (STOCK, INVACT, EXACT):
                raise
            errors[name] = _error(error)
    return steppers, errors


def _planned(stepper: Stepper) -> dict[str, Any]:
    """What invact's report says of a way of its own."""
    report = stepper.report
    if report is None:
        return {}
    return {
        "inverted": len(report.inverted),
        "derived": len(report.derived),
        "report_bytes_before": report.bytes_before,
        "report_bytes_after": report.bytes_after,
    }


def warm_up(name: str, steppers: dict[str, Stepper], stock: list[Tensor | None], found: dict[str, Any]) -> None:
    """Takes the first steps, compares the gradients; a way that fails is left out and says why."""
    stepper = steppers[name]
    try:
        off = difference(stepper.gradients(), stock)
        found[name] |= {"gradients_off": off, "live_bytes": stepper.live_bytes()}
        stepper.seconds()
    except Exception as error:
        if name in (STOCK, INVACT, EXACT):
            raise
        stepper.model.zero_grad()
        del steppers[name]
        found[name] = _error(error)


def race(steppers: Mapping[str, Stepper], found: dict[str, Any], tiny: bool, write: Callable[[], None]) -> None:
    """Adds times and, on a GPU, peaks, and writes them after every round: who is stopped in the midst leaves those."""
    once = sum(stepper.seconds() for stepper in steppers.values())
    rounds = 2 if tiny else max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS_OF_TURNS / once)))
    turns, written = Race(), 0

    def after(_: str) -> None:
        nonlocal written
        if turns.rounds == written:
            return
        written = turns.rounds
        for name, stepper in steppers.items():
            found[name] |= times(turns, name)
            if stepper.peak_bytes:
                found[name]["peak_bytes"] = stepper.peak_bytes
        write()

    turns.run({name: stepper.seconds for name, stepper in steppers.items()}, rounds, after)


def _error(error: Exception) -> dict[str, str]:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return {"error": f"{type(error).__name__}: {str(error)[:400]}"}
