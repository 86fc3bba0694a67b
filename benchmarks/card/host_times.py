"""Part "host": what the host needs to call an activation, and from which batch on a step hides that."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from card_models import DEVICE, model_and_inputs
from record import Record
from ways import INVACT, STOCK, Stepper, eager_ways

from invact.bench_kernels import HOST_ELEMENTS, time_kernels
from invact.bench_result import Bench
from invact.planning import decide
from invact.timing import Race

BATCHES = (1, 2, 4, 8, 16, 32)
TOKENS = 128
NO_SLOWER = 1.02


def measure(item: str, record: Record, tiny: bool) -> None:
    """Item "gelu" or "bert"."""
    record[item] = _host_microseconds(tiny) if item == "gelu" else _smallest_batch(item, tiny)


def _host_microseconds(tiny: bool) -> dict[str, Any]:
    bench = Bench.on(DEVICE, "")
    time_kernels(
        bench,
        ["gelu"],
        [torch.bfloat16],
        elements=HOST_ELEMENTS,
        rounds=2 if tiny else 20,
        against=[STOCK],
        device=DEVICE,
        with_copy=False,
    )
    return {
        each.passed: {who: 1e6 * each.race.median(who) for who in each.race.seconds}
        for each in bench.kernels
        if "host" in each.passed
    }


def _smallest_batch(item: str, tiny: bool) -> dict[str, Any]:
    """Ratios of a patched step to a stock one by batch, and the smallest batch from which on none is too slow."""
    model, inputs_of = model_and_inputs(item, tiny, tokens=TOKENS)
    ratios = {}
    for batch in BATCHES[:2] if tiny else BATCHES:
        inputs = inputs_of(batch)
        ways = eager_ways(model, decide(model, inputs))
        stepper = Stepper(model, model, inputs)
        turns = {name: partial(stepper.seconds, ways[name]) for name in (STOCK, INVACT)}
        for turn in turns.values():
            turn(), turn()
        race = Race()
        race.run(turns, 2 if tiny else 15)
        ratios[batch] = {
            "ratio": race.ratio(INVACT),
            "quartiles": race.quartiles(INVACT),
            "stock_seconds": race.median(STOCK),
        }
    smallest = None
    for batch in sorted(ratios, reverse=True):
        if ratios[batch]["ratio"] > NO_SLOWER:
            break
        smallest = batch
    return {"by_batch": ratios, "tokens": TOKENS, "smallest_batch_no_slower": smallest}
