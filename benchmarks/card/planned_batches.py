"""Part "planner": the largest batch that the planner names, and the largest that really runs, in so much memory."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from card_models import DEVICE, SPECS, model_and_inputs
from record import Record
from torch import nn
from verdicts import verdict_on_batch

from invact.bench.stepper import loss_of
from invact.fitting.batches import Need, needs
from invact.fitting.lifetimes import WEIGHT, Lifetimes, levels
from invact.patchers.checkpointing import checkpointed
from invact.planning.plans import decide
from invact.simulation.setting import Setting

MEMORY = 24 << 30
TINY_MEMORY = 1 << 23
ALLOCATOR = {
    "": "blocks of fixed sizes: what lies between two that are used is reserved, and serves no larger tensor; on one "
    "H200 by a tenth more than was allocated",
    "expandable_segments:True": "segments grow, and hardly more is reserved than is allocated; as PyTorch advises "
    "where memory is short",
}
"""By PYTORCH_CUDA_ALLOC_CONF, what it means for the batch that fits."""


def prepare(item: str, tiny: bool) -> tuple[nn.Module, Any, Any, dict[str, Need]]:
    """A model, what makes its inputs, what is decided, and what it is planned to need, by way."""
    model, inputs_of = model_and_inputs(SPECS[item], tiny)
    decided = decide(model, inputs_of(2))
    return model, inputs_of, decided, needs(model, inputs_of, Setting(DEVICE), decided)


def measure(item: str, record: Record, tiny: bool, prepared: tuple[nn.Module, Any, Any, dict[str, Need]]) -> None:
    """Item: a key of `card_models.SPECS`. Trained with AdamW."""
    model, inputs_of, decided, predicted = prepared
    memory = TINY_MEMORY if tiny else MEMORY
    _cap(memory)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ways = {
        "baseline": nullcontext,
        "invact": lambda: decided.applied(model),
        "checkpointing": lambda: checkpointed(model),
    }
    setting = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    found: dict[str, Any] = {
        "memory_bytes": memory,
        "allocator": {"setting": setting, "of this run": ALLOCATOR.get(setting), "all": ALLOCATOR},
        "ways": {},
    }
    for name, way in ways.items():
        search = _Search(model, inputs_of, optimizer, way, memory, predicted[name])
        planned = predicted[name].largest_batch(memory)
        true = search.largest(planned)
        found["ways"][name] = {
            "planned": planned,
            "true": true,
            "verdict": verdict_on_batch(planned, true),
            "need": predicted[name].lines,
            "tries": search.tries,
        }
        record[item] = found


def _cap(memory: int) -> None:
    """So that this process may take so much of the card and no more."""
    if DEVICE.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(memory / torch.cuda.get_device_properties(DEVICE).total_memory)


class _Search:
    """Tries batches around the one that is planned."""

    def __init__(self, model: nn.Module, inputs_of: Any, optimizer: Any, way: Any, memory: int, need: Need) -> None:
        self.model, self.inputs_of, self.optimizer, self.way, self.memory = model, inputs_of, optimizer, way, memory
        self.need = need
        self.tries: list[dict[str, Any]] = []

    def largest(self, guess: int) -> int:
        """By bisection, between bounds that grow until they hold it; 0 if nothing fits."""
        low, high, width = 0, guess + 1, max(1, guess // 20)
        while self._fits(high):
            low, high, width = high, high + width, 2 * width
        if low == 0 and guess > 1:
            width, probe = max(1, guess // 20), guess
            while probe > 0 and not self._fits(probe):
                high, probe, width = probe, probe - width, 2 * width
            low = max(0, probe)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle)
        return low

    def _fits(self, batch: int) -> bool:
        """Whether two steps with the optimiser's run: the second one has its states."""
        attempt: dict[str, Any] = {"batch": batch, "predicted": self.need.bytes_at(batch)}  # beside what it took
        try:
            with self.way():
                attempt |= self._step(batch)
            attempt["fits"] = attempt.get("bytes", 0) <= self.memory
        except torch.OutOfMemoryError:
            attempt["fits"] = False
        self.model.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        self.tries.append(attempt)
        fits: bool = attempt["fits"]
        return fits

    def _step(self, batch: int) -> dict[str, int]:
        inputs = self.inputs_of(batch)
        if DEVICE.type != "cuda":
            with Lifetimes() as lifetimes:
                for tensor in [*self.model.parameters(), *self.model.buffers(), *inputs.values()]:
                    lifetimes.see(tensor, WEIGHT)
                self._train(inputs)
            return {"bytes": _most_alive(lifetimes)}
        torch.cuda.reset_peak_memory_stats()
        self._train(inputs)
        torch.cuda.synchronize()
        return {"peak_allocated": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}

    def _train(self, inputs: Any) -> None:
        """Two steps, as the planner counts them: of the first the optimizer has its states."""
        for _ in range(2):
            loss_of(self.model(**inputs)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def _most_alive(lifetimes: Lifetimes) -> int:
    return max(levels(((a.nbytes, a.born, a.died) for a in lifetimes.allocations()), lifetimes.now))
