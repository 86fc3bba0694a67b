"""What a bench has measured, as tables: one for every curve in every dtype, and one for every model's step."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from invact.bench_result import COPY, Bench, KernelTimes, StepTimes
from invact.contenders import STOCK
from invact.machine import machine_in_words
from invact.report import format_bytes
from invact.timing import Race

_NAMES = ("pass", "contender", "way")


def print_bench(bench: Bench, console: Console) -> None:
    """Prints everything. "of stock's" is the median of the ratios to stock's time in the same round, "middle half" the
    quartiles between which half of these ratios lie.
    """
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    console.print(f"{bench.date} · {machine_in_words(bench.machine)}", style="bold", highlight=False)
    console.print(versions, style="dim", highlight=False)
    for curve, dtype in dict.fromkeys((times.curve, times.dtype) for times in bench.kernels):
        chosen = [times for times in bench.kernels if (times.curve, times.dtype) == (curve, dtype)]
        sizes = dict.fromkeys(f"{times.elements:,} elements" for times in chosen)
        _print_heading(f"{curve}, {dtype}, {', host time on '.join(sizes)}", console)
        console.print(_kernel_table(chosen))
    for step in bench.steps:
        _print_heading(f"A step of {step.model}: {step.model_class}, {step.inputs}, {step.dtype}", console)
        console.print(_step_table(step))
        console.print(step.saved_in_words(), highlight=False)
    for note in bench.left_out:
        console.print(f"Left out: {note}", highlight=False, markup=False)


def format_seconds(seconds: float) -> str:
    """With a unit: 0.0015 is "1.50 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.2f} µs"


def _kernel_table(passes: Sequence[KernelTimes]) -> Table:
    copied = any(COPY in times.race.seconds for times in passes)
    columns = ["pass", "contender", "time", "of stock's", "middle half", "kept besides y", "GB/s"]
    table = _table([*columns, "of a copy's"] if copied else columns)
    for times in passes:
        for number, name in enumerate(times.race.seconds):
            kept = times.kept_besides_output_bytes.get(name)
            rate, share = times.bytes_per_second(name), times.of_copy(name)
            cells = [
                "" if number else times.passed,
                *_time_cells(times.race, name),
                "" if kept is None else format_bytes(kept),
                "" if rate is None else f"{rate / 1e9:.1f}",
                "" if share is None else f"{share:.0%}",
            ]
            table.add_row(*cells[: len(table.columns)], end_section=number == len(times.race.seconds) - 1)
    return table


def _step_table(step: StepTimes) -> Table:
    columns = ["way", "time", "of stock's", "middle half", "kept", "of stock's"]
    table = _table([*columns, "peak"] if step.peak_bytes else columns)
    for way in step.race.seconds:
        kept = step.kept_bytes[way]
        peak = [format_bytes(step.peak_bytes[way])] if step.peak_bytes else []
        share = f"{kept / step.kept_bytes[STOCK]:.1%}"
        table.add_row(*_time_cells(step.race, way), format_bytes(kept), share, *peak)
    return table


def _time_cells(race: Race, name: str) -> list[str]:
    low, high = race.quartiles(name)
    return [name, format_seconds(race.median(name)), f"{race.ratio(name):.3f}", f"{low:.3f} - {high:.3f}"]


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in _NAMES else "right", overflow="fold")
    return table


def _print_heading(text: str, console: Console) -> None:
    console.print(f"\n{text}", style="bold", highlight=False, soft_wrap=True)
