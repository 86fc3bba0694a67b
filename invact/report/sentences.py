"""What a plan comes to, in sentences: the totals, how far from the floor, the peak; and in one line for a log."""

from __future__ import annotations

from invact.report.amounts import counted, format_bytes, in_words
from invact.report.figures import Figures

BEYOND_TENSORS = 1 << 29
"""Bytes of a GPU that CUDA's context and libraries take, about: 400 to 600 MiB on NVIDIA's cards of today."""

_MORE_THAN_IS_LEFT = (
    "CUDA's own context and libraries take half a GiB or so, which is more than is left: if the GPU has no more than "
    "this, ask for half a GiB less. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is against fragments."
)

_BEYOND_TENSORS = (
    "Not counted are CUDA's own context and libraries, half a GiB or so; with "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True the allocator hardly reserves more than that."
)

NOTICEABLE = 0.05
"""The share of what is kept after from which on the loss's is told of."""

_FAR = 0.08
"""How far above the floor a plan is said to be far from it."""

_WORTH_SAYING = 0.005
"""The least share of what remains that is told of by itself."""


def in_one_line(figures: Figures) -> str:
    """What was done and what it comes to, for a log."""
    done = [f"{len(figures.inverted)} of {len(figures.sites)} activations inverted"]
    done += [f"{len(figures.approximate)} approximate"] if figures.approximate else []
    done += [f"{len(figures.derived)} tensors made again"] if figures.derived else []
    done += [f"{len(figures.fused)} norms fused"] if figures.fused else []
    done += [f"{counted(len(figures.blocks), 'block')} checkpointed"] if figures.blocks else []
    kept = f"{format_bytes(figures.bytes_after)} instead of {format_bytes(figures.bytes_before)} kept for backward"
    line = f"invact: {', '.join(done)}; {kept}, {figures.saving:.1%} less"
    if figures.peak_bytes:
        budget = f" of {format_bytes(figures.memory_bytes)}" if figures.memory_bytes else ""
        line += f"; predicted peak of a step {format_bytes(figures.peak_bytes)}{budget}"
    return line


def totals(figures: Figures) -> str:
    lines = [
        f"Kept for backward: {format_bytes(figures.bytes_before)} before, "
        f"{format_bytes(figures.bytes_after)} after: {figures.saving:.1%} saved."
    ]
    if figures.derived:
        moved = format_bytes(sum(tensor.bytes_moved for tensor in figures.derived))
        lines.append(
            f"{format_bytes(sum(tensor.bytes_saved for tensor in figures.derived))} of that by making tensors again, "
            f"for which backward reads and writes {moved}."
        )
    if figures.bytes_after and figures.kept_by_class:
        largest = list(figures.kept_by_class.items())[:6]
        shares = ", ".join(f"{name} {nbytes / figures.bytes_after:.1%}" for name, nbytes in largest)
        lines.append(f"The rest is kept by: {shares}.")
    lines += distance_from_floor(figures)
    if figures.weight_cast_bytes:
        lines.append(
            f"Besides, autocast keeps {format_bytes(figures.weight_cast_bytes)} of cast weights, whatever the batch."
        )
    if figures.loss_bytes >= NOTICEABLE * figures.bytes_after > 0:
        share = f"{figures.loss_bytes / figures.bytes_after:.1%}"
        lines.append(f"Of what is kept after, {format_bytes(figures.loss_bytes)} are the loss's, {share}.")
    lines += peak_in_words(figures)
    if figures.compiled:
        lines.append(
            f"Compiled, {format_bytes(figures.compiled['default'])} by default, "
            f'{format_bytes(figures.compiled["invact"])} with backend="invact".'
        )
    return "\n".join(lines)


def distance_from_floor(figures: Figures) -> list[str]:
    """What would remain if all were derived that can be, what remains, and why it is more; in sentences."""
    if not figures.bytes_floor or figures.blocks:
        return []
    above = figures.bytes_after / figures.bytes_floor - 1
    lines = [
        f"The floor is {format_bytes(figures.bytes_floor)}, what reading and writing memory alone can not make again: "
        + _from_floor(above, bool(figures.approximate))
    ]
    shares = [
        f"{kind.removeprefix('other: ')} {nbytes / figures.bytes_after:.1%}"
        for kind, nbytes in figures.remains.items()
        if nbytes >= _WORTH_SAYING * figures.bytes_after
    ]
    if shares:
        lines.append(f"What remains was made by: {', '.join(shares)}.")
    # Where the floor is far, all that keeps it there.
    worth = (_WORTH_SAYING if above <= _FAR else _WORTH_SAYING / 10) * figures.bytes_after
    lines += [
        f"Kept though it could be made again: {format_bytes(nbytes)} by {name}."
        for name, nbytes in figures.not_derived.items()
        if nbytes >= worth
    ]
    if above > _FAR and figures.inverted:
        lines.append("Besides, an inverted activation keeps its output and mostly a bit per element.")
    return lines


def _from_floor(above: float, approximate: bool) -> str:
    if above >= 0.0005:
        return f"this plan is {above:.1%} above it."
    if approximate and above <= -0.0005:
        return f"this plan is {-above:.1%} below it, since some derivatives are approximate."
    return "this plan is there."


def peak_in_words(figures: Figures) -> list[str]:
    """The predicted peak before and after, where it is and what it is for, and what is left of the budget."""
    if not figures.peak_bytes:
        return []
    lines = [
        f"Peak of a step with {figures.optimizer}: {format_bytes(figures.peak_bytes_before)} before, "
        f"{format_bytes(figures.peak_bytes)} after, {figures.peak_at}: {in_words(figures.peak)}."
    ]
    if figures.memory_bytes >= figures.peak_bytes:
        left = format_bytes(figures.memory_bytes - figures.peak_bytes)
        how = f"{counted(len(figures.blocks), 'block')} checkpointed" if figures.blocks else "nothing checkpointed"
        if figures.peak_bytes_before <= figures.memory_bytes:
            how += "; it fits as it is, too"
        lines.append(f"It fits {format_bytes(figures.memory_bytes)} with {left} left, {how}.")
        if "on cuda" in figures.setting:
            short = figures.memory_bytes - figures.peak_bytes < BEYOND_TENSORS
            lines.append(_MORE_THAN_IS_LEFT if short else _BEYOND_TENSORS)
    return lines
