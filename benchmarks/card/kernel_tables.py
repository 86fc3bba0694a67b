"""The tables of the parts "kernels" and "fused", a line for each of what was timed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verdicts import misses

Part = dict[str, Any]


def of_curves(part: Part) -> Iterator[str]:
    yield "us and x stock of forward, backward; both x stock; shares of a copy"
    for name, found in part.items():
        passes = [found["forward"], found["backward"]]
        took = ", ".join(f"{each['microseconds']['invact']:.0f} {each['ratio']:.3f}" for each in passes)
        shares = " ".join(f"{each['of_copy']:.2f}" for each in passes)
        said = "; ".join(misses(found["verdict"]))
        yield f"{name:18} {took}; {found['both']:.3f}; {shares}{'; not: ' + said if said else ''}"


def of_fused(part: Part) -> Iterator[str]:
    yield "us in several operators -> in one, x as long; share of a copy"
    for name, found in part.items():
        if "absent" in found:
            yield f"{name}: left out, {found['absent']}"
            continue
        took = ", ".join(_pass(what, each) for what, each in found["passes"].items())
        said = "; ".join(misses(found["verdict"]))
        yield f"{name:15} {took}; {found['of_copy']:.2f}{'; not: ' + said if said else ''}"


def _pass(name: str, found: Part) -> str:
    took = found["microseconds"]
    return f"{name} {took['stock']:.0f} -> {took['invact']:.0f} {found['ratio']:.3f}"
