"""Whether figures are what they are to be. Each verdict holds the figure, its bound, and whether it "holds"."""

from __future__ import annotations

from typing import Any

PEAK_OFF = 0.02  # how far, as a share of stock's peak, its fall may be from what the report says
SLOWEST_INVERTING = 1.01  # x stock, of every model
SLOWEST = {"bert": 1.03, "vit": 1.03, "gpt2": 1.03, "mistral": 1.00}  # x stock
FASTER_THAN_CHECKPOINTING = 1.20  # how many times as long that takes
KERNELS, OF_COPY = 1.05, 0.90  # forward and backward together x stock; share of a copy's bandwidth
KERNELS_BOUND = ("gelu bfloat16", "silu bfloat16")
FUSED = 1.00  # x PyTorch's way in several operators
BATCH_OFF = 0.05
HOST = 1.02

Verdict = dict[str, Any]


def verdict_on_steps(name: str, ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Verdict]]:
    """By way of invact's and what is asked; what was not measured is left out.

    Without a GPU there is no peak, and what lives at the end of forward is looked at in its stead.

    Args:
        name: of the model.
        ways: by way, "ratio" to stock's time, "peak_bytes" or "live_bytes", "report_bytes_before" and "..._after".
    """
    found: dict[str, dict[str, Verdict]] = {}
    for way in ("invact", "exact"):
        ours = ways.get(way, {})
        if "ratio" in ours and "ratio" in ways.get("stock", {}):
            found[way] = _verdict_on_way(name, ours, ways)
    alone = ways.get("inverting", {})
    if "ratio" in alone:
        found["inverting"] = {"time": _verdict(alone["ratio"], SLOWEST_INVERTING, alone["ratio"] <= SLOWEST_INVERTING)}
    return found


def _verdict_on_way(name: str, ours: dict[str, Any], ways: dict[str, dict[str, Any]]) -> dict[str, Verdict]:
    memory = "peak_bytes" if "peak_bytes" in ours else "live_bytes"
    stock = ways["stock"][memory]
    told = ours["report_bytes_before"] - ours["report_bytes_after"]
    off = (stock - ours[memory] - told) / stock
    found: dict[str, Verdict] = {"memory as told": _verdict(off, PEAK_OFF, abs(off) <= PEAK_OFF)}
    if name in SLOWEST:
        found["time"] = _verdict(ours["ratio"], SLOWEST[name], ours["ratio"] <= SLOWEST[name])
    other = ways.get("selective", {})
    if "ratio" in other:
        less, sooner = ours[memory] / other[memory], ours["ratio"] / other["ratio"]
        found["memory of selective"] = _verdict(less, 1.0, less < 1)
        found["time of selective"] = _verdict(sooner, 1.0, sooner < 1)
    other = ways.get("checkpointing", {})
    if "ratio" in other:
        longer = other["ratio"] / ours["ratio"]
        found["checkpointing takes"] = _verdict(longer, FASTER_THAN_CHECKPOINTING, longer >= FASTER_THAN_CHECKPOINTING)
    return found


def verdict_on_kernels(name: str, found: dict[str, Any]) -> dict[str, Verdict]:
    """Of a curve in a dtype, such as "gelu bfloat16"; empty where none is asked for."""
    if name not in KERNELS_BOUND:
        return {}
    both, least = found["both"], min(found["forward"]["of_copy"], found["backward"]["of_copy"])
    return {
        "time": _verdict(both, KERNELS, both <= KERNELS),
        "share of a copy": _verdict(least, OF_COPY, least >= OF_COPY),
    }


def verdict_on_fused(slowest: float) -> dict[str, Verdict]:
    """Of a kernel in the place of several operators; the figure: the largest of its passes' ratios to those."""
    return {"time": _verdict(slowest, FUSED, slowest <= FUSED)}


def verdict_on_batch(planned: int, true: int) -> Verdict:
    """The figure: by how much of the true one the planned one is off."""
    return _verdict(planned / max(true, 1) - 1, BATCH_OFF, abs(planned - true) <= BATCH_OFF * true)


def smallest_batch_no_slower(ratios: dict[int, float]) -> int | None:
    """From which on no batch is slower than `HOST` x stock."""
    smallest = None
    for batch in sorted(ratios, reverse=True):
        if ratios[batch] > HOST:
            break
        smallest = batch
    return smallest


def misses(verdicts: dict[str, Verdict]) -> list[str]:
    """In words, what does not hold."""
    return [f"{what} {v['figure']:.3g} (bound {v['bound']:g})" for what, v in verdicts.items() if not v["holds"]]


def _verdict(figure: float, bound: float, holds: bool) -> Verdict:
    return {"figure": figure, "bound": bound, "holds": holds}
