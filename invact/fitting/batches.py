"""The largest batch that fits a GPU: a whole step simulated at two batch sizes, by way of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from invact.errors.checks import Inputs
from invact.fitting.optimizers import OptimizerLike
from invact.fitting.simulated_training import simulated_training
from invact.fitting.step import Step
from invact.patchers.checkpointing import can_checkpoint, checkpointed
from invact.planning.plans import Decided
from invact.report.amounts import format_bytes
from invact.simulation.setting import Setting

# Two sizes give the lines. Not 1: batch norm refuses a single sample.
_BATCHES = (2, 4)


@dataclass(frozen=True)
class _Way:
    """A way of training: what is done to the model, and that in words."""

    in_words: str
    patched: bool = False
    checkpointed: bool = False


_WAYS = {
    "baseline": _Way("as it is"),
    "invact": _Way("with invact", patched=True),
    "checkpointing": _Way("with checkpointing", checkpointed=True),
    "invact+checkpointing": _Way("with both", patched=True, checkpointed=True),
}


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a training step, by the batch: the highest of some moments, each of them linear in it.

    Attributes:
        lines: of each moment that may be the highest, the bytes whatever the batch, and those for a sample.
    """

    lines: tuple[tuple[int, int], ...]

    def bytes_at(self, batch_size: int) -> int:
        return max(constant + batch_size * per_sample for constant, per_sample in self.lines)

    def largest_batch(self, memory: int) -> int:
        """0 if not even one sample fits.

        Example:
            >>> Need(((100, 10), (140, 2))).largest_batch(149), Need(((100, 10),)).largest_batch(99)
            (4, 0)
        """
        fits = ((memory - constant) // max(1, per_sample) for constant, per_sample in self.lines)
        return max(0, min(fits))


@dataclass(frozen=True)
class Batches:
    """The largest batches in the memory of one GPU, predicted.

    Attributes:
        memory_bytes: of the GPU, all of it.
        optimizer: its name.
        needs: by way of training: "baseline", "invact", "checkpointing", "invact+checkpointing"; the last two
            only for models that can be checkpointed.
    """

    memory_bytes: int
    optimizer: str
    needs: dict[str, Need]

    @property
    def largest_batch(self) -> dict[str, int]:
        return {way: need.largest_batch(self.memory_bytes) for way, need in self.needs.items()}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest_batch": self.largest_batch}

    def __str__(self) -> str:
        batches = ", ".join(f"{batch} {_WAYS[way].in_words}" for way, batch in self.largest_batch.items())
        return f"Largest batch in {format_bytes(self.memory_bytes)} with {self.optimizer}: {batches}."


def needs(
    model: nn.Module,
    inputs_of: Callable[[int], Inputs],
    setting: Setting,
    decided: Decided,
    *,
    optimizer: OptimizerLike = "adamw",
    batches: tuple[int, int] = _BATCHES,
) -> dict[str, Need]:
    """What a training step needs at its peak, by way of training.

    Args:
        model: on any device or on meta; what is checkpointed already is so in every way, and stays so afterwards.
        inputs_of: makes the model's inputs, best with labels, for a batch size.
        decided: what invact does to the model.
        optimizer: a name of `invact.fitting.optimizers.NAMES`, or one of the user's.
        batches: two sizes, the smaller first, best near those asked for: kernels on a CPU work in pieces, so that some
            temporaries grow with small batches alone.

    Raises:
        NotSimulatedError: the step does not run on simulated tensors.
    """
    ways = {name: way for name, way in _WAYS.items() if not way.checkpointed or can_checkpoint(model)}
    steps: dict[str, list[Step]] = {name: [] for name in ways}
    for batch in batches:
        with simulated_training(model, inputs_of(batch), setting, optimizer) as take_step:
            for name, way in ways.items():
                with (
                    decided.applied(model) if way.patched else nullcontext(),
                    checkpointed(model) if way.checkpointed else nullcontext(),
                ):
                    steps[name].append(take_step())
    return {name: _need(small, large, batches) for name, (small, large) in steps.items()}


def _need(small: Step, large: Step, batches: tuple[int, int]) -> Need:
    """From the same step with two batches."""
    pairs = list(zip(small.alive, large.alive, strict=False))
    if len(small.alive) != len(large.alive):  # it ran otherwise with more samples
        pairs = list(zip(_highest_by_part(small), _highest_by_part(large), strict=True))
    first, second = batches
    lines = set()
    for at_first, at_second in pairs:
        per_sample = max(0, -(-(at_second - at_first) // (second - first)))
        lines.add((large.resident + at_second - second * per_sample, per_sample))
    return Need(tuple(_highest(lines)))


def _highest_by_part(step: Step) -> list[int]:
    """Of forward, its end, backward, and the optimizer's step: where all is alike whatever the batch, and where not."""
    turn, alive = step.forward_ended, step.alive
    return [max(alive[:turn]), alive[turn], max(alive[turn:-1]), alive[-1]]


def _highest(lines: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that no other is above at every batch, the steepest first."""
    kept: list[tuple[int, int]] = []
    for constant, per_sample in sorted(lines, key=lambda line: (-line[1], -line[0])):
        if not kept or constant > kept[-1][0]:
            kept.append((constant, per_sample))
    return kept
