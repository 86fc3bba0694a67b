"""Part "host": what the host pays for an activation, a tensor, a step, and from which batch on a step hides that."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from card_models import DEVICE, SPECS, model_and_inputs
from record import Record
from steppers import Stepper, times
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from verdicts import smallest_batch_no_slower
from ways import EXACT, INVACT, STOCK, eager_ways

from invact.bench.kernels import HOST_ELEMENTS, time_kernels
from invact.bench.result import Bench
from invact.bench.timing import Race, wait_for
from invact.deriving.handles import Derived
from invact.deriving.hooks import Deriving
from invact.deriving.saved_by_node import kept_by

NOTHING = "hooks of nothing"
BATCHES = (1, 8, 32, 64, 128, 256)
TOKENS = 128
PRODUCTS = 20  # in a row: on a busy machine one that takes longer than a time slice is seldom left alone


def prepare(item: str, tiny: bool) -> Any:
    """Steppers, planned and patched, where whole steps are taken."""
    return PREPARED[item](tiny) if item in PREPARED else None


def measure(item: str, record: Record, tiny: bool, prepared: Any) -> None:
    """Item: a key of `MEASURED`."""
    threads = torch.get_num_threads()
    if item in ("narrow", "tensors"):
        torch.set_num_threads(1)
    try:
        for found in MEASURED[item](tiny, prepared):  # each with more than the one before
            record[item] = found
    finally:
        torch.set_num_threads(threads)


def _gelu(tiny: bool, _: None) -> Iterator[dict[str, Any]]:
    """Microseconds until a call returns."""
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
    yield {
        each.passed: {who: 1e6 * each.race.median(who) for who in each.race.seconds}
        for each in bench.kernels
        if "host" in each.passed
    }


def _bert_by_batch(tiny: bool) -> dict[int, dict[str, Stepper]]:
    model, inputs_of = model_and_inputs(SPECS["bert"], tiny, tokens=TOKENS)
    ways = eager_ways(model)
    return {
        batch: {name: Stepper(model, inputs_of(batch), ways[name]) for name in (STOCK, INVACT)}
        for batch in (BATCHES[:2] if tiny else BATCHES)
    }


def _smallest_batch(tiny: bool, by_batch: dict[int, dict[str, Stepper]]) -> Iterator[dict[str, Any]]:
    """Ratios of a patched step of BERT to a stock one by batch, and the smallest from which on none is too slow."""
    found = {}
    for batch, steppers in by_batch.items():
        found[batch] = _raced(steppers, 2 if tiny else 15)[INVACT]
        smallest = smallest_batch_no_slower({batch: each["ratio"] for batch, each in found.items()})
        yield {"by_batch": found, "tokens": TOKENS, "smallest_batch_no_slower": smallest}


def _narrow_bert(tiny: bool) -> dict[str, Stepper]:
    """Its tensors have too few elements to be derived, but for those of the feed-forward layers."""
    spec = SPECS["bert-narrow"]
    model, inputs_of = model_and_inputs(spec, tiny, dtype=torch.float32)
    inputs, ways = inputs_of(spec.batch), eager_ways(model)
    steppers = {name: Stepper(model, inputs, ways[name]) for name in (STOCK, INVACT, EXACT)}
    return steppers | {NOTHING: Stepper(model, inputs, around=_hooks_of_nothing)}


def _narrow(tiny: bool, steppers: dict[str, Stepper]) -> Iterator[dict[str, Any]]:
    """A step that waits for nothing but the host."""
    yield {"inputs": "1 x 8 tokens"} | _raced(steppers, 3 if tiny else 60)


def _raced(steppers: dict[str, Stepper], rounds: int) -> dict[str, Any]:
    for stepper in steppers.values():
        for _ in range(3):
            stepper.seconds()
    race = Race()
    race.run({way: stepper.seconds for way, stepper in steppers.items()}, rounds)
    return {way: times(race, way) for way in steppers}


def _hooks_of_nothing() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _tensors(tiny: bool, _: None) -> Iterator[dict[str, dict[str, float]]]:
    """Microseconds per tensor, above what stock takes for keeping it: packed in forward, unpacked in backward.

    A row of products keeps two tensors for each; with an activation after each, a third, and one of the three is
    derived. What that takes is what the second row takes beyond the first, the operator that is run again included.
    """
    weight = torch.eye(32, device=DEVICE).requires_grad_()  # 1024 elements: as few as are derived
    start = torch.randn(32, 32, device=DEVICE)

    def row(activated: bool) -> torch.Tensor:
        x = start
        for _ in range(PRODUCTS):
            x = x @ weight
            if activated:
                x = nn.functional.silu(x)
        return x @ weight

    with Deriving():
        last = row(True)
    assert isinstance(kept_by(last.grad_fn, "self"), Derived)
    del last

    def both(around: Callable[[], AbstractContextManager[object]], activated: bool) -> tuple[float, float]:
        """Microseconds of forward and of backward for each product."""
        wait_for(DEVICE)
        before = time.perf_counter()
        with around():
            loss = row(activated)
        middle = time.perf_counter()
        loss.backward(start)
        after = time.perf_counter()
        wait_for(DEVICE)
        weight.grad = None
        return 1e6 * (middle - before) / PRODUCTS, 1e6 * (after - middle) / PRODUCTS

    arounds = {STOCK: nullcontext, NOTHING: _hooks_of_nothing, "deriving": Deriving}
    took: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for number in range(4 if tiny else 201):
        for name, around in arounds.items():
            for activated in (False, True):
                taken = both(around, activated)
                if number:  # the first one warms up
                    took.setdefault((name, activated), []).append(taken)

    def beyond(name: str, activated: bool, side: int) -> float:
        pairs = zip(took[name, activated], took[STOCK, activated], strict=True)
        return statistics.median(own[side] - stock[side] for own, stock in pairs)

    found: dict[str, dict[str, float]] = {"by hooks of nothing": {}, "kept": {}, "derived": {}}
    for side, direction in enumerate(("forward", "backward")):
        kept = beyond("deriving", False, side) / 2
        found["by hooks of nothing"][direction] = beyond(NOTHING, False, side) / 2
        found["kept"][direction] = kept
        found["derived"][direction] = beyond("deriving", True, side) - 2 * kept
    yield found


PREPARED: dict[str, Callable[[bool], Any]] = {"bert": _bert_by_batch, "narrow": _narrow_bert}
MEASURED: dict[str, Callable[[bool, Any], Iterator[dict[str, Any]]]] = {
    "gelu": _gelu,
    "bert": _smallest_batch,
    "narrow": _narrow,
    "tensors": _tensors,
}
