"""What one way of training has come to in a trial."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BASELINE, INVACT = "baseline", "invact"
EXACT, SELECTIVE, FIT, COMPRESSION = "exact", "selective", "fit", "compression"
_APPROXIMATE = "fewbit-"


@dataclass
class Run:
    """One way of training.

    Attributes:
        activation_bytes: what one process keeps between forward and backward of a real step, with the loss.
        peak_bytes: of GPU memory during a step, this way's weights and optimiser states included; None without one.
        seconds_per_step: the median; the first step, which warms up and is counted, is left out.
        losses: by step, of the first seed.
        losses_by_seed: the same for every seed.
        largest_difference: of a loss from the baseline's at the same step and seed.
        end_difference: of the mean of the last tenth of the steps from the baseline's, the largest of all seeds.
        largest_batch: that fits the given memory, predicted; None if no memory was given, or where it is not predicted.
        processes: how many share a batch.
        sent_bytes: of gradients that a process gives to the others in a step, and what they are in fp32; None without.
    """

    name: str
    activation_bytes: int
    peak_bytes: int | None
    seconds_per_step: float
    losses: list[float]
    losses_by_seed: list[list[float]]
    largest_difference: float = 0.0
    end_difference: float = 0.0
    largest_batch: int | None = None
    processes: int = 1
    sent_bytes: tuple[int, int] | None = None

    @property
    def approximate(self) -> bool:
        """Whether its derivatives are meant to be coarse, and not only rounded."""
        return self.name.startswith(_APPROXIMATE)

    @property
    def bytes_of_all(self) -> int:
        """Kept for the whole batch, by all processes together."""
        return self.activation_bytes * self.processes


def ends(losses_by_seed: Sequence[Sequence[float]]) -> list[float]:
    """By seed, the mean of the last tenth of the steps: single batches differ by more than ways of training do.

    Example:
        >>> ends([[9.0, 2.0, 4.0], [5.0] * 18 + [1.0, 2.0]])
        [4.0, 1.5]
    """
    return [statistics.fmean(losses[-max(1, len(losses) // 10) :]) for losses in losses_by_seed]
