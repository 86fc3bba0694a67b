"""All figures as a short text, less than 10,000 characters: what failed and what missed first, then the figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kernel_tables import of_curves, of_fused
from verdicts import misses

LONGEST = 9800
MOST_FAILURES = 8
MEBIBYTE = 1 << 20
ALWAYS_PROFILED = ("bert", "mistral")

Part = dict[str, Any]


def collected(folder: Path) -> dict[str, Part]:
    """Every part that stands in the folder, by its name; first the one that names the card, versions and date."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem != "card", path.stem))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def as_text(folder: Path) -> str:
    """The table of whatever parts there are in the folder."""
    parts = collected(folder)
    lines: list[str] = []
    for name, part in parts.items():
        lines += [f"{name}: {line}" for key in part if key.startswith("error") for line in _error(key, part[key])]
    for name, make in MAKERS.items():
        if name in parts:
            lines += [f"== {name}", *_or_why_not(make, parts[name])]
    lines += _or_why_not(_profiles, parts.get("steps", {}))
    text = "\n".join(lines)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n... cut"


def _or_why_not(make: Callable[[Part], Iterator[str]], part: Part) -> list[str]:
    """A table that can not be made must not hide the others."""
    try:
        return list(make({key: value for key, value in part.items() if not key.startswith("error")}))
    except Exception as error:
        return [f"no table: {type(error).__name__}: {error}"]


def _error(key: str, text: str) -> list[str]:
    first, *rest = text.splitlines()
    return [f"{key}: {first}", *(f"    {line[:160]}" for line in rest[-6:])]


# --- parts --------------------------------------------------------------------------------------------


def _card(part: Part) -> Iterator[str]:
    card = part["card"]
    machine, versions = card["machine"], card["versions"]
    name, runtime = machine.get("gpu", machine.get("cpu")), machine.get("runtime", "")
    yield f"{name} {runtime} driver {card['driver']} {card['date']}"
    yield ", ".join(f"{name} {version}" for name, version in versions.items()) + f"; {part['seconds']:.0f} s in all"


def _tests(part: Part) -> Iterator[str]:
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
            largest[what] = max(value, largest.get(what, value))
        if largest:
            yield "at most: " + ", ".join(f"{what} {value:.4g}" for what, value in largest.items())


def _steps(part: Part) -> Iterator[str]:
    yield "way: x stock (quartiles) ms; MiB: peak, saved (told); live after forward; gradients off: all, largest"
    for name, found in part.items():
        if "absent" in found:
            yield f"{name}: left out, {found['absent']}"
            continue
        verdicts = {f"{way}: {what}": v for way, each in found.get("verdict", {}).items() for what, v in each.items()}
        held = sum(v["holds"] for v in verdicts.values())
        said = "; ".join(misses(verdicts))
        yield f"{name} {found['inputs']}: {held} of {len(verdicts)} hold{'; not: ' + said if said else ''}"
        yield from _ways(found["ways"])


def _ways(ways: Part) -> Iterator[str]:
    stock = ways.get("stock", {}).get("peak_bytes", 0)
    for way, found in ways.items():
        if "error" in found:
            yield f" {way}: {found['error'][:160]}"
        elif found:
            yield f" {way:13} {_way(found, stock)}"


def _way(found: Part, stock: int) -> str:
    cells = ["not timed"]
    if "ratio" in found:
        low, high = found["quartiles"]
        cells = [f"{found['ratio']:.3f} ({low:.2f}-{high:.2f}) {1000 * found['seconds']:.1f}"]
    if peak := found.get("peak_bytes"):
        told = (found["report_bytes_before"] - found["report_bytes_after"]) if "report_bytes_before" in found else None
        saved = f"{(stock - peak) / MEBIBYTE:.0f}" + (f" ({told / MEBIBYTE:.0f})" if told is not None else "")
        cells.append(f"{peak / MEBIBYTE:.0f}, {saved}")
    if "live_bytes" in found:
        cells.append(f"live {found['live_bytes'] / MEBIBYTE:.0f}")
    if off := found.get("gradients_off"):
        cells.append(f"{off['whole']:.0e} {off['largest']:.0e}" if off["whole"] else "same gradients")
    return "; ".join(cells)


def _exact(part: Part) -> Iterator[str]:
    """One line for every model."""
    cells: dict[str, list[str]] = {}
    for key, found in part.items():
        name, _, precision = key.rpartition(" ")
        exact, ours = found["exact"], found["invact"]
        bits = "bit for bit" if exact["bit_for_bit"] else f"{exact['off']:.0e} off"
        itself = "" if found["stock_repeats_itself"] else f" (stock itself {found['stock_off']:.0e})"
        cells.setdefault(name, []).append(f"{precision}: exact {bits}{itself}, invact {ours['off']:.0e}")
    yield from (f"{name}: {'; '.join(each)}" for name, each in cells.items())


def _host(part: Part) -> Iterator[str]:
    for passed, took in part.get("gelu", {}).items():
        yield f"gelu {passed}: " + ", ".join(f"{who} {us:.1f} us" for who, us in took.items())
    for what, took in part.get("tensors", {}).items():
        yield f"a tensor {what}: " + ", ".join(f"{passed} {us:.1f} us" for passed, us in took.items())
    if narrow := part.get("narrow"):
        ways = {way: found for way, found in narrow.items() if isinstance(found, dict)}
        yield "narrow BERT, x stock: " + ", ".join(f"{way} {found['ratio']:.3f}" for way, found in ways.items())
    if bert := part.get("bert"):
        ratios = ", ".join(f"{batch}: {found['ratio']:.3f}" for batch, found in bert["by_batch"].items())
        yield f"BERT x {bert['tokens']} tokens, invact x stock by batch: {ratios}"
        yield f"no slower than 1.02 x stock from batch {bert['smallest_batch_no_slower']} on"


def _planner(part: Part) -> Iterator[str]:
    for name, found in part.items():
        ways = found["ways"]
        said = "; ".join(misses({way: each["verdict"] for way, each in ways.items()}))
        cells = ", ".join(f"{way} {each['planned']} planned, {each['true']} true" for way, each in ways.items())
        allocator = found["allocator"]["setting"] or "PyTorch's own setting"
        yield f"{name} in {found['memory_bytes'] / (1 << 30):.1f} GiB, {allocator}: {cells}"
        if said:
            yield f"  not: {said}"


def _compiled(part: Part) -> Iterator[str]:
    for name, found in part.items():
        yield f"{name} {found['inputs']}"
        yield from _ways(found["ways"])


def _profiles(part: Part) -> Iterator[str]:
    """Of steps slower than they are to be, and always of two; last, for what is cut stands in the file."""
    for name, found in part.items():
        slow = not found.get("verdict", {}).get("invact", {}).get("time", {"holds": True})["holds"]
        if "profile" in found and (slow or name in ALWAYS_PROFILED):
            profile, ways = found["profile"], found["ways"]
            walls = ", ".join(
                f"{profile[f'{way}_us']:.0f} of {1e6 * ways[way]['seconds']:.0f} {way}" for way in ("stock", "invact")
            )
            yield f"== profile of {name}: us of kernels of a step: {walls}; by difference:"
            for row in profile["differences"][:4]:
                before, after = row["stock_us"], row["invact_us"]
                yield f" {after - before:+.0f} us ({before:.0f} -> {after:.0f}) {row['name'][:60]}"


MAKERS: dict[str, Callable[[Part], Iterator[str]]] = {
    "card": _card,
    "tests": _tests,
    "kernels": of_curves,
    "fused": of_fused,
    "steps": _steps,
    "exact": _exact,
    "host": _host,
    "planner": _planner,
    "compiled": _compiled,
}
