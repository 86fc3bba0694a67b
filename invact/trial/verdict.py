"""Which way of training is the one to use for a workload, from the figures of a trial alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from invact.report.amounts import format_bytes
from invact.trial.way_result import Run
from invact.trial.ways import BASELINE, COMPRESSION, INVACT, way_called

ROUNDING = 0.01  # of the loss: what rounding may come to in a few steps, judged without a spread; chosen
_ALIKE = 0.01  # bytes and times closer than that are one; chosen, as times are read to a hundredth


@dataclass(frozen=True)
class Yardsticks:
    """What a way of training is judged by.

    Attributes:
        spread: the largest difference between the baseline's losses of two seeds at the same step; None with one seed.
        finals: the baseline's final losses, by seed; those of models differ by less than those of their batches.
        memory_bytes: of the GPU that it is to fit, or None.
    """

    spread: float | None = None
    finals: Sequence[float] = ()
    memory_bytes: int | None = None

    @property
    def final_spread(self) -> float | None:
        """The largest difference between the baseline's final losses; None if fewer than two seeds came to an end."""
        return max(self.finals) - min(self.finals) if len(self.finals) > 1 else None

    def final_difference(self, run: Run) -> float:
        """The largest of a way's final loss from the baseline's from the same seed; 0 where none came to an end."""
        return max((abs(one - other) for one, other in zip(run.final_losses, self.finals, strict=True)), default=0.0)

    def within_spread(self, run: Run) -> bool | None:
        """Whether a way's losses differ from the baseline's by no more than another seed's do, at each step and at the
        end; None with one seed."""
        if self.spread is None:
            return None
        at_the_end = self.final_spread is None or self.final_difference(run) <= self.final_spread
        return run.largest_difference <= self.spread and at_the_end

    def against_losses(self, run: Run) -> str | None:
        """Why a way is not to be used for what it learns; None if that is the baseline's."""
        if self.spread is None:
            if run.approximate:
                return "is approximate, which one seed does not judge"
            off = run.largest_difference > ROUNDING * abs(run.losses[-1])
            return f"differs by {run.largest_difference:.2g}, more than rounding does" if off else None
        if self.within_spread(run):
            return None
        if run.largest_difference > self.spread:
            return f"has losses off by {run.largest_difference:.2g}, more than the {self.spread:.2g} between seeds"
        final = self.final_difference(run)
        return f"has a final loss off by {final:.2g}, more than the {self.final_spread:.2g} between seeds"

    def against_memory(self, run: Run) -> str | None:
        """Why a way is not to be used for what it needs at its peak, predicted or, failing that, measured; None if it
        fits, or no memory was named."""
        if self.memory_bytes is None:
            return None
        memory = format_bytes(self.memory_bytes)
        peak = run.peak_bytes if run.predicted_peak_bytes is None else run.predicted_peak_bytes
        if peak is None:
            return f"is not predicted to fit in {memory}"
        return None if peak <= self.memory_bytes else f"does not fit in {memory}, its peak is {format_bytes(peak)}"


def judge(runs: Sequence[Run], measure: Yardsticks) -> str:
    """Which way is the one to use, what the others cost, and why they are not.

    Ways that do not fit the memory, if one was named, are out, and ways whose losses leave the spread between seeds.
    Of those that remain it is the one that keeps the fewest bytes for the whole batch, and of several that keep as few,
    the fastest; where they have a memory to fit, and do, the fastest of all, and of several as fast, the one that keeps
    the fewest bytes.

    Args:
        runs: the baseline first.
    """
    refused = {run.name: why for run in runs if (why := measure.against_memory(run) or measure.against_losses(run))}
    remaining = [run for run in runs if run.name not in refused]
    if not remaining:
        return f"None of these is the one to use here. {_refusals(refused)}"
    baseline = runs[0]
    best = _fewest_bytes(remaining) if measure.memory_bytes is None else _fastest(remaining)
    words = [f"For this workload use {_name(best)}: {_why(best, baseline, measure)}."]
    faster, others = _worth_their_bytes(remaining, best, baseline)
    if faster:
        words.append(f"Where that time is too long: {_figures(faster, baseline)}.")
    if others and measure.memory_bytes is not None:
        words.append(f"These fit as well: {_figures(others, baseline)}.")
    elif others:
        words.append(f"Nothing is won by: {_figures(others, baseline)}.")
    if refused:
        words.append(_refusals(refused))
    if not way_called(best.name).ours:
        words.append(_why_not_invact(runs, refused, best, measure))
    return " ".join(words)


def _fewest_bytes(runs: Sequence[Run]) -> Run:
    fewest = min(run.bytes_of_all for run in runs)
    return min((run for run in runs if run.bytes_of_all <= (1 + _ALIKE) * fewest), key=lambda run: run.seconds_per_step)


def _fastest(runs: Sequence[Run]) -> Run:
    least = min(run.seconds_per_step for run in runs)
    as_fast = (run for run in runs if run.seconds_per_step <= (1 + _ALIKE) * least)
    return min(as_fast, key=lambda run: run.bytes_of_all)


def _worth_their_bytes(runs: Sequence[Run], best: Run, baseline: Run) -> tuple[list[Run], list[Run]]:
    """Of the other ways, fewest bytes first, those that save something and are faster than all that save more; and the
    others, but for the baseline."""
    faster: list[Run] = []
    others: list[Run] = []
    quickest = best.seconds_per_step
    for run in sorted((run for run in runs if run not in (best, baseline)), key=lambda run: run.bytes_of_all):
        saves = run.bytes_of_all < (1 - _ALIKE) * baseline.bytes_of_all
        if saves and run.seconds_per_step < (1 - _ALIKE) * quickest:
            faster.append(run)
            quickest = run.seconds_per_step
        else:
            others.append(run)
    return faster, others


def _why(best: Run, baseline: Run, measure: Yardsticks) -> str:
    within = "stay within the spread between seeds" if measure.spread is not None else "are the baseline's to rounding"
    if measure.memory_bytes is None:
        return f"of the ways whose losses {within} it keeps the fewest bytes, {_figure(best, baseline)}"
    fitting = f"that fit in {format_bytes(measure.memory_bytes)} and whose losses {within}"
    return f"of the ways {fitting} it takes the least time, {_figure(best, baseline)}"


def _figures(runs: Sequence[Run], baseline: Run) -> str:
    return ", ".join(f"{_name(run)} ({_figure(run, baseline)})" for run in runs)


def _figure(run: Run, baseline: Run) -> str:
    share = f"{run.bytes_of_all / baseline.bytes_of_all:.1%}"
    slower = f"{run.seconds_per_step / baseline.seconds_per_step:.2f}"
    if run is baseline:
        return "and is what the others are measured by"
    return f"{share} of the baseline's at {slower} times its time"


def _name(run: Run) -> str:
    if run.name == COMPRESSION:
        return "gradient compression in two processes"
    return "no way at all, the baseline" if run.name == BASELINE else run.name


def _refusals(refused: dict[str, str]) -> str:
    return "Not: " + "; ".join(f"{name} {why}" for name, why in refused.items()) + "."


def _why_not_invact(runs: Sequence[Run], refused: dict[str, str], best: Run, measure: Yardsticks) -> str:
    ours = next((run for run in runs if run.name == INVACT), None)
    if ours is None:
        return ""
    why = refused.get(INVACT)
    otherwise = f"it keeps {format_bytes(ours.bytes_of_all)}, {best.name} {format_bytes(best.bytes_of_all)}"
    if measure.memory_bytes is not None:
        slower = f"{ours.seconds_per_step / best.seconds_per_step:.2f}"
        otherwise = f"it takes {slower} times the time, and memory is not short"
    return f"invact is not the one to use here: {'it ' + why if why else otherwise}."
