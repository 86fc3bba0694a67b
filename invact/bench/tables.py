"""What a bench has measured, as tables: one for every curve in every dtype, and one for every model's step."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from invact.bench.contenders import STOCK
from invact.bench.records import COPY, KernelTimes, StepTimes
from invact.bench.timing import Race
from invact.report.amounts import format_bytes
from invact.report.tables import Column, print_table

_NAMES = ("pass", "contender", "way")


def print_kernels(kernels: Sequence[KernelTimes], console: Console) -> None:
    """Prints a table for every curve in every dtype.

    "of stock's" is the median of the ratios to stock's time in the same round, "middle half" the quartiles between
    which half of these ratios lie; so it is in the tables of steps.
    """
    for curve, dtype in dict.fromkeys((times.curve, times.dtype) for times in kernels):
        chosen = [times for times in kernels if (times.curve, times.dtype) == (curve, dtype)]
        sizes = dict.fromkeys(f"{times.elements:,} elements" for times in chosen)
        _print_heading(f"{curve}, {dtype}, {', host time on '.join(sizes)}", console)
        _print_passes(chosen, console)


def print_steps(steps: Sequence[StepTimes], console: Console) -> None:
    """Prints a table for every model's step, and what it saved beside what was planned."""
    for step in steps:
        _print_heading(f"A step of {step.model}: {step.model_class}, {step.inputs}, {step.dtype}", console)
        _print_step(step, console)
        console.print(step.saved_in_words(), highlight=False)


def format_seconds(seconds: float) -> str:
    """With a unit: 0.0015 is "1.50 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def _print_passes(passes: Sequence[KernelTimes], console: Console) -> None:
    copied = any(COPY in times.race.seconds for times in passes)
    names = ["pass", "contender", "time", "of stock's", "middle half", "kept besides y", "GB/s"]
    columns = _columns([*names, "of a copy's"] if copied else names)
    rows = [_kernel_cells(times, name)[: len(columns)] for times in passes for name in times.race.seconds]
    print_table(console, columns, rows, grouped=True)


def _kernel_cells(times: KernelTimes, name: str) -> list[str]:
    kept = times.kept_besides_output_bytes.get(name)
    rate, share = times.bytes_per_second(name), times.of_copy(name)
    return [
        times.passed,
        *_time_cells(times.race, name),
        "" if kept is None else format_bytes(kept),
        "" if rate is None else f"{rate / 1e9:.1f}",
        "" if share is None else f"{share:.0%}",
    ]


def _print_step(step: StepTimes, console: Console) -> None:
    names = ["way", "time", "of stock's", "middle half", "kept", "of stock's"]
    rows = []
    for way in step.race.seconds:
        kept = step.kept_bytes[way]
        peak = [format_bytes(step.peak_bytes[way])] if step.peak_bytes else []
        share = f"{kept / step.kept_bytes[STOCK]:.1%}"
        rows.append([*_time_cells(step.race, way), format_bytes(kept), share, *peak])
    print_table(console, _columns([*names, "peak"] if step.peak_bytes else names), rows)


def _time_cells(race: Race, name: str) -> list[str]:
    low, high = race.quartiles(name)
    return [name, format_seconds(race.median(name)), f"{race.ratio(name):.3f}", f"{low:.3f} - {high:.3f}"]


def _columns(names: Sequence[str]) -> list[Column]:
    return [Column(name, right=name not in _NAMES) for name in names]


def _print_heading(text: str, console: Console) -> None:
    console.print(f"\n{text}", style="bold", highlight=False)
