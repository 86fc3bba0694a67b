"""Part "compiled": steps of a compiled model, as a user compiles it and with invact's backend, beside stock."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from card_models import SPECS, batch_of, model_and_inputs
from record import Record
from step_times import made, race
from steppers import difference
from torch import Tensor
from ways import COMPILE, STOCK, compiled_ways

from invact.report.inputs import size_in_words

SECONDS_TO_COMPILE = 45  # for each of the two ways


def prepare(item: str, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """The inputs, and a stepper for every way; nothing is compiled before the first step."""
    model, inputs_of = model_and_inputs(SPECS[item], tiny)
    inputs = inputs_of(batch_of(SPECS[item], tiny))
    steppers, _ = made(model, inputs, compiled_ways(tiny))
    return inputs, steppers


def measure(item: str, record: Record, tiny: bool, prepared: tuple[Any, dict[str, Any]]) -> None:
    """Item: a key of `card_models.SPECS`. Dropout is the compiler's own, so that the gradients of invact's backend are
    compared with those of the other one."""
    inputs, steppers = prepared
    found: dict[str, Any] = {"inputs": size_in_words(inputs), "ways": {}}
    steppers[STOCK].gradients()
    found["ways"][STOCK] = {"live_bytes": steppers[STOCK].live_bytes()}
    by_default: list[Tensor | None] = []
    gradients: list[Tensor | None] = []
    for name in [name for name in steppers if name != STOCK]:
        try:
            start = time.perf_counter()
            with _at_most(SECONDS_TO_COMPILE):
                gradients = steppers[name].gradients()
            found["ways"][name] = {"seconds_to_compile": time.perf_counter() - start}
            if by_default:
                found["ways"][name]["gradients_off"] = difference(gradients, by_default)
            elif name == COMPILE:
                by_default = gradients
            if steppers[name].device.type == "cuda":
                found["ways"][name]["live_bytes"] = steppers[name].live_bytes()
        except Exception as error:
            del steppers[name]
            found["ways"][name] = {"error": f"{type(error).__name__}: {str(error)[:400]}"}
        record[item] = found
    by_default, gradients = [], []
    race(steppers, found["ways"], tiny, lambda: record.__setitem__(item, found))


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
