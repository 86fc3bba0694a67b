"""What one way of training has come to in a trial."""

from __future__ import annotations

from dataclasses import dataclass, field

from invact.trial.ways import FEW_BITS


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
        final_losses: by seed, of the trained model on the same samples, whatever the way and the seed.
        predicted_peak_bytes: of a whole step of one process on the device at hand, simulated; None where that does not
            go, as under torch.compile.
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
    final_losses: list[float] = field(default_factory=list)
    predicted_peak_bytes: int | None = None
    largest_batch: int | None = None
    processes: int = 1
    sent_bytes: tuple[int, int] | None = None

    @property
    def approximate(self) -> bool:
        """Whether its derivatives are meant to be coarse, and not only rounded."""
        return self.name in FEW_BITS

    @property
    def bytes_of_all(self) -> int:
        """Kept for the whole batch, by all processes together."""
        return self.activation_bytes * self.processes
