"""The drawings of a page: memory by layer, the course of a step, the losses of a trial; as SVG to stand in HTML."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from invact.fitting.step import KINDS, Step
from invact.planning.by_layer import Layer
from invact.report.amounts import format_bytes
from invact.trial.result import Trial

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with any kind of colour vision (Okabe & Ito, 2008), and on white as on black.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_REST_COLOUR = "#888888"
_LINES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (5, 5)))
# Drawn in this colour, which nothing else has, and turned into the page's own colour of text.
_INK = "#010203"
_MOST_BARS = 16
_LONGEST_LABEL = 22  # characters
_WIDTH = 4.8  # inches: 10 points stay readable when that is shrunk to the width of a phone


@dataclass(frozen=True)
class Chart:
    """A drawing, its caption, and what it shows in words for who does not see it."""

    svg: str
    caption: str
    alternative: str


def memory_chart(layers: Sequence[Layer]) -> Chart:
    """Two bars for every layer, before and after, stacked by the class that keeps the bytes."""
    from matplotlib.patches import Patch

    totals: Counter[str] = Counter()
    for layer in layers:
        totals.update(layer.before)
        totals.update(layer.after)
    classes = [name for name, _ in totals.most_common(len(_COLOURS))]
    rows = _rows(layers)
    unit, unit_bytes = _unit(max(sum(kept.values()) for layer in rows for kept in (layer.before, layer.after)))
    colours: dict[str | None, str] = {**dict(zip(classes, _COLOURS, strict=False)), None: _REST_COLOUR}
    figure, axes = _drawing(height=1.3 + 0.42 * len(rows))
    for side, offset, alpha in (("before", -0.2, 0.5), ("after", 0.2, 1)):
        kept: list[dict[str, int]] = [getattr(layer, side) for layer in rows]
        start = [0.0] * len(rows)
        for name, colour in colours.items():
            widths = [_kept_by(by_class, name, classes) / unit_bytes for by_class in kept]
            axes.barh([row + offset for row in range(len(rows))], widths, 0.36, start, color=colour, alpha=alpha)
            start = [begin + width for begin, width in zip(start, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [_label(layer.name) for layer in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{unit} kept for backward")
    labels = [name or "others" for name in colours if name or len(totals) > len(classes)]
    _legend(figure, [Patch(color=colour) for colour in colours.values()][: len(labels)], labels)
    before, after = (sum(sum(getattr(layer, side).values()) for layer in layers) for side in ("before", "after"))
    largest = max(layers, key=lambda layer: sum(layer.before.values()) - sum(layer.after.values()))
    return Chart(
        _svg(figure, "memory"),
        "Memory by layer: the upper, fainter bar before patching, the lower one after it.",
        f"Bars of what {len(layers)} layers keep for backward: {format_bytes(before)} before, {format_bytes(after)} "
        f"after. Most is saved in {largest.name}: {format_bytes(sum(largest.before.values()))} before, "
        f"{format_bytes(sum(largest.after.values()))} after.",
    )


def _rows(layers: Sequence[Layer]) -> Sequence[Layer]:
    """The bars to draw: in a deep model neighbours that keep the same share one, so that it can be read on paper."""
    if len(layers) <= _MOST_BARS:
        return layers
    rows = []
    for _, alike in groupby(layers, lambda layer: (layer.name.rstrip("0123456789"), layer.before, layer.after)):
        first, *others = alike
        last = others[-1].name.rpartition(".")[2] if others else ""
        rows.append(Layer(f"{first.name}-{last}, each", first.before, first.after) if last else first)
    return rows


def _label(name: str) -> str:
    """In two lines if it would take the width from the bars."""
    stem, dot, end = name.rpartition(".")
    if len(name) <= _LONGEST_LABEL or not dot:
        return name
    stem, dot, middle = stem.rpartition(".")
    return f"{stem}{dot}\n{middle}.{end}"


def _kept_by(kept: dict[str, int], name: str | None, classes: Sequence[str]) -> int:
    """Bytes of one class; with None, of all that are not among the classes."""
    return kept.get(name, 0) if name else sum(nbytes for other, nbytes in kept.items() if other not in classes)


_POINTS = 300  # of a course, more than there are to see


def timeline_chart(before: Step, after: Step, memory_bytes: int = 0) -> Chart:
    """What is alive in the course of a step, by what it is for, under the line of the step before patching."""
    figure, axes = _drawing(height=3.6)
    highest = max(before.peak_bytes, after.peak_bytes, memory_bytes)
    unit, unit_bytes = _unit(highest)
    course = after.course(_POINTS)
    moments = [_progress(after, moment) for moment, _ in course]
    kinds = [kind for kind in KINDS if any(alive.get(kind) for _, alive in course)]
    layers = [[alive.get(kind, 0) / unit_bytes for _, alive in course] for kind in kinds]
    axes.stackplot(moments, layers, labels=kinds, colors=_COLOURS, lw=0)
    stock = before.course(_POINTS)
    levels = [sum(alive.values()) / unit_bytes for _, alive in stock]
    axes.plot([_progress(before, moment) for moment, _ in stock], levels, color=_INK, lw=1, label="before")
    if memory_bytes:
        axes.axhline(memory_bytes / unit_bytes, color=_INK, lw=1, ls="--", label="the budget")
    axes.set_xticks([0, 1, 2], ["forward", "backward", "optimizer"])
    axes.set_ylabel(unit)
    _legend(figure, *axes.get_legend_handles_labels())
    return Chart(
        _svg(figure, "timeline"),
        f"Memory in a step: {format_bytes(after.peak_bytes)} at the highest, {after.where(after.highest)}; before "
        f"patching {format_bytes(before.peak_bytes)}, {before.where(before.highest)}. By the count of operations.",
        "The course of a step from forward over backward to the optimizer, highest at "
        f"{format_bytes(after.peak_bytes)} {after.where(after.highest)}; before patching at "
        f"{format_bytes(before.peak_bytes)}.",
    )


def _progress(step: Step, moment: int) -> float:
    """From 0 to 1 in forward, from 1 to 2 in backward: two steps turn at the same place."""
    if moment < step.forward_ended:
        return moment / step.forward_ended
    return 1 + (moment - step.forward_ended) / max(1, step.backward_ended - step.forward_ended)


def loss_chart(trial: Trial) -> Chart:
    """The losses of every way over each other, and the range of the baseline's over the seeds."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _drawing(height=3.4)
    for position, run in enumerate(trial.runs):
        # Wider below, thinner on top: curves that coincide are all seen.
        width = 1 + min(1.1, 6 / len(trial.runs)) * (len(trial.runs) - 1 - position)
        colour = _COLOURS[position % len(_COLOURS)]
        line = _LINES[(position + position // len(_COLOURS)) % len(_LINES)]  # another where a colour comes again
        axes.plot(range(1, len(run.losses) + 1), run.losses, ls=line, color=colour, lw=width, label=run.name)
    baseline = trial.runs[0].losses_by_seed
    if len(baseline) > 1:
        by_step = list(zip(*baseline, strict=False))
        lowest, highest = [min(losses) for losses in by_step], [max(losses) for losses in by_step]
        steps = range(1, len(by_step) + 1)
        axes.fill_between(steps, lowest, highest, color=_REST_COLOUR, alpha=0.3, label="baseline, all seeds", lw=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, *axes.get_legend_handles_labels())
    finals = ", ".join(f"{run.name} {run.losses[-1]:.4f}" for run in trial.runs)
    return Chart(
        _svg(figure, "loss"),
        "Loss by step, first seed, every way over the others; where one line is seen, they coincide.",
        f"Curves of the loss over {len(trial.runs[0].losses)} steps, from {trial.runs[0].losses[0]:.4f} to: {finals}.",
    )


# --- drawing ------------------------------------------------------------------------------------------


def _drawing(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False, labelcolor=_INK)


def _svg(figure: Figure, name: str) -> str:
    """The drawing as an element of a page: its text as text, its ids its own, its ink the page's."""
    import matplotlib as mpl

    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)


def _unit(nbytes: int) -> tuple[str, int]:
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    return next(((unit, size) for unit, size in units.items() if nbytes >= size), ("B", 1))
