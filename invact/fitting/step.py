"""What is alive in the course of a training step: its highest point, what that is for, and where it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from invact.fitting.lifetimes import WEIGHT, WEIGHT_CAST, Allocation, Call, levels
from invact.fitting.optimizers import Held
from invact.fitting.work import Work

KINDS = WEIGHTS, STATES, GRADIENTS, CASTS, KEPT, TEMPORARY = (
    "weights",
    "optimizer states",
    "gradients",
    "casts of weights",
    "kept for backward",
    "temporary",
)
"""What bytes are for, in a step. Inputs count to what is kept."""

INPUT = "input"

_TURN = 0.02
"""The share of a step's operations that is taken for the turn from forward to backward. Chosen, not measured: wide
enough for the operations of a loss on either side of it."""


@dataclass(frozen=True)
class Step:
    """What is alive in the course of a step that is one of many: the optimizer has its states, gradients are None.

    A moment is the number of an operation; the last one stands for the optimizer's step as a whole.

    Attributes:
        allocations: of forward and backward.
        forward_ended, backward_ended: the moments.
        gradients, kept: which of the allocations are parameters' gradients, and are alive when forward ends.
        weights: bytes of parameters and buffers.
        held: by the optimizer.
        calls: the first forward of each module, by path.
        changed: when forward last changed an allocation in place, but for batch norms' running statistics.
        from_its_loss: whether backward began at a loss of the model's own, and not at the sum of what it gives.
        work: what forward computes; only where it was asked for.
    """

    allocations: list[Allocation]
    forward_ended: int
    backward_ended: int
    gradients: frozenset[int]
    kept: frozenset[int]
    weights: int
    held: Held
    calls: dict[str, Call]
    changed: dict[int, int]
    from_its_loss: bool
    work: Work | None = None

    @cached_property
    def alive(self) -> list[int]:
        """Bytes of the allocations alive at each moment, without weights and optimizer states."""
        lives = ((a.nbytes, a.born, a.died) for a in self.allocations if a.operator != WEIGHT)
        alive = levels(lives, self.backward_ended)
        alive[-1] += self.held.temporary
        return alive

    @property
    def resident(self) -> int:
        """Bytes that are there all the time: weights and optimizer states."""
        return self.weights + self.held.states

    @property
    def gradient_bytes(self) -> int:
        """Of all parameters' gradients."""
        return sum(self.allocations[number].nbytes for number in self.gradients)

    @property
    def kept_bytes(self) -> int:
        """Between forward and backward, besides weights, their casts and inputs."""
        apart = (WEIGHT, WEIGHT_CAST, INPUT, GRADIENTS)
        return sum(self.allocations[n].nbytes for n in self.kept if self.allocations[n].operator not in apart)

    @cached_property
    def highest(self) -> int:
        """The moment at which most is alive."""
        return max(range(len(self.alive)), key=self.alive.__getitem__)

    @property
    def is_at_the_turn(self) -> bool:
        """Whether most is alive about where forward ends and backward begins, as it is beside a loss."""
        return abs(self.highest - self.forward_ended) <= _TURN * self.backward_ended

    @property
    def peak_bytes(self) -> int:
        return self.resident + self.alive[self.highest]

    def kinds_at(self, moment: int) -> dict[str, int]:
        """What is alive at a moment, by what it is for; the sum of it is all."""
        found = Counter({WEIGHTS: self.weights, STATES: self.held.states})
        for number, allocation in enumerate(self.allocations):
            if allocation.operator != WEIGHT and allocation.born <= moment < allocation.died:
                found[self._kind(number, allocation)] += allocation.nbytes
        if moment == self.backward_ended:
            found[TEMPORARY] += self.held.temporary
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def course(self, points: int) -> list[tuple[int, dict[str, int]]]:
        """The highest moment of each of so many stretches of the step, and `kinds_at` it."""
        stretch = max(1, len(self.alive) // points)
        starts = range(0, len(self.alive), stretch)
        moments = [max(range(at, min(at + stretch, len(self.alive))), key=self.alive.__getitem__) for at in starts]
        return [(moment, self.kinds_at(moment)) for moment in moments]

    def _kind(self, number: int, allocation: Allocation) -> str:
        if allocation.operator == WEIGHT_CAST:
            return CASTS
        if number in self.gradients:
            return GRADIENTS
        return KEPT if number in self.kept else TEMPORARY

    def where(self, moment: int) -> str:
        """What a moment is in words, such as "in backward, NllLossBackward0 of lm_head"."""
        if moment >= self.backward_ended:
            return "in the optimizer's step"
        phase = "in forward" if moment < self.forward_ended else "in backward"
        made = next((a for a in self.allocations if a.born == moment and a.operator not in (WEIGHT, INPUT)), None)
        return f"{phase}, {made.operator} of {made.path or 'the model itself'}" if made else phase
