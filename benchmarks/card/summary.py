"""All figures as a short text: less than 10,000 characters, the failures among them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST = 9800
MOST_FAILURES = 8
MEBIBYTE = 1 << 20


def collected(folder: Path) -> dict[str, Any]:
    """Every part that stands in the folder, by its name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def as_text(folder: Path) -> str:
    """The table of whatever parts there are in the folder."""
    parts = collected(folder)
    makers = {
        "card": _card,
        "tests": _tests,
        "kernels": _kernels,
        "steps": _steps,
        "host": _host,
        "profile": _profile,
        "planner": _planner,
    }
    lines: list[str] = []
    for name, make in makers.items():
        if name in parts:
            lines.append(f"== {name}")
            lines += _or_why_not(make, parts[name])
            lines += [
                line for key, text in parts[name].items() if key.startswith("error") for line in _error(key, text)
            ]
    text = "\n".join(lines)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n... cut"


def _or_why_not(make: Any, part: dict[str, Any]) -> list[str]:
    """A table that can not be made must not hide the others."""
    try:
        return list(make({key: value for key, value in part.items() if not key.startswith("error")}))
    except Exception as error:
        return [f"no table: {type(error).__name__}: {error}"]


def _error(key: str, text: str) -> list[str]:
    first, *rest = text.splitlines()
    return [f"{key}: {first}", *(f"    {line[:160]}" for line in rest[-8:])]


def _card(part: dict[str, Any]) -> Iterator[str]:
    card = part["card"]
    machine, versions = card.get("machine", {}), card.get("versions", {})
    name, runtime = machine.get("gpu", machine.get("cpu")), machine.get("runtime", "")
    yield f"{name} {runtime} driver {card.get('driver')} {card.get('date')}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {part['seconds']:.0f} s in all"


def _tests(part: dict[str, Any]) -> Iterator[str]:
    for found in part.values():
        yield f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
        failures = list(found["failures"].items())
        for name, text in failures[:MOST_FAILURES]:
            yield f"FAILED {name}"
            yield from (f"    {line[:140]}" for line in text.splitlines()[-3:])
        if failures[MOST_FAILURES:]:
            yield "FAILED too: " + ", ".join(name for name, _ in failures[MOST_FAILURES:])[:600]
        largest: dict[str, Any] = {}
        for name, value in found["figures"].items():
            what = name.rpartition(": ")[2]
            if value > largest.get(what, (-1, ""))[0]:
                largest[what] = (value, name.rpartition(": ")[0])
        yield from (f"{what}: at most {value:.4g} ({where})" for what, (value, where) in largest.items())


def _kernels(part: dict[str, Any]) -> Iterator[str]:
    """Alone: microseconds, ours over stock's, share of the copy; then through autograd, the ratio and the share."""
    yield "curve dtype | alone: fwd us ours/stock of copy, bwd us ours/stock of copy | autograd: fwd bwd both x stock"
    for key, found in part.items():
        kind, name, dtype = key.split()
        if kind != "alone":
            continue
        cells = [
            f"{found[p]['microseconds']['invact']:6.0f} {_ratio(found[p]['ratio'])} {found[p]['of_copy']:.2f}"
            for p in ("forward", "backward")
        ]
        autograd = part.get(f"autograd {name} {dtype}", {})
        ratios = [
            _ratio(autograd[p]["invact"]["ratio"])
            for p in ("forward", "backward", "forward + backward")
            if p in autograd
        ]
        yield f"{name:10} {dtype:8} | {', '.join(cells)} | {' '.join(ratios)}"


def _steps(part: dict[str, Any]) -> Iterator[str]:
    yield "way: x stock (quartiles), seconds, peak MiB, saved MiB (report's), gradients off (whole, largest)"
    for name, found in part.items():
        reported = (found["report_bytes_before"] - found["report_bytes_after"]) / MEBIBYTE
        yield (
            f"{name}: {found['inputs']} {found['dtype'].removeprefix('torch.')}, "
            f"{found['inverted']} of {found['sites']} sites, the report saves {reported:.0f} of "
            f"{found['report_bytes_before'] / MEBIBYTE:.0f} MiB"
        )
        stock = found["ways"].get("stock", {}).get("peak_bytes", 0)
        for way, measured in found["ways"].items():
            yield f"  {way:14} {_way(measured, stock, reported if 'invact' in way else None)}"


def _way(measured: dict[str, Any], stock: int, reported: float | None) -> str:
    if "error" in measured:
        return f"error: {measured['error'][:200]}"
    if "ratio" not in measured:
        return "not timed"
    low, high = measured["quartiles"]
    peak = measured["peak_bytes"]
    saved = f"{(stock - peak) / MEBIBYTE:.0f}" + (f" ({reported:.0f})" if reported is not None else "")
    off = measured.get("gradients_off")
    gradients = f"{off['whole']:.1e} {off['largest']:.1e}" if off else "-"
    return (
        f"{measured['ratio']:.3f} ({low:.3f}-{high:.3f}) {measured['seconds']:.4f} s, "
        f"{peak / MEBIBYTE:.0f}, {saved}, {gradients}"
    )


def _host(part: dict[str, Any]) -> Iterator[str]:
    for passed, times in part.get("gelu", {}).items():
        yield f"gelu {passed}: " + ", ".join(f"{who} {us:.1f} us" for who, us in times.items())
    if bert := part.get("bert"):
        ratios = ", ".join(f"{batch}: {found['ratio']:.3f}" for batch, found in bert["by_batch"].items())
        yield f"BERT x {bert['tokens']} tokens, invact x stock by batch: {ratios}"
        yield f"no slower than 1.02 x stock from batch {bert['smallest_batch_no_slower']} on"


def _profile(part: dict[str, Any]) -> Iterator[str]:
    for name, found in part.items():
        yield f"{name}: kernels {found['stock_us']:.0f} us stock, {found['invact_us']:.0f} us invact; by difference:"
        for row in found["differences"]:
            before, after = row["stock_us"], row["invact_us"]
            yield f"  {after - before:+8.0f} us ({before:.0f} -> {after:.0f}) {row['name'][:70]}"


def _planner(part: dict[str, Any]) -> Iterator[str]:
    for name, found in part.items():
        cells = (
            f"{way} {each['planned']} planned, {each['true']} true"
            for way, each in found.items()
            if isinstance(each, dict)
        )
        yield f"{name} in {found['memory_bytes'] / (1 << 30):.1f} GiB: {'; '.join(cells)}"


def _ratio(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"
