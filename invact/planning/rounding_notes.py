"""Where a site computes its curve in several steps and rounds each to 16 bits: how far off that is, in its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from invact.kernels import Curve
from invact.planning.deciding import Decision
from invact.probing.records import Call
from invact.recognition.curves import Rounding, own_rounding
from invact.report import reasons
from invact.report.records import INVERT


def with_roundings(decisions: Sequence[Decision], calls: Mapping[str, Sequence[Call]]) -> list[Decision]:
    """The decisions; the reasons of inverted sites say how both round, in each 16-bit type that they were given.

    Args:
        calls: of each site, by path.
    """
    known: dict[tuple[str, Curve, torch.dtype], Rounding | None] = {}
    told = []
    for decision in decisions:
        if decision.action == INVERT:
            site, words = decision.site, ""
            for dtype in sorted({call.dtype for call in calls[site.path] if call.dtype.itemsize == 2}, key=str):
                key = (site.label, site.curve, dtype)
                if key not in known:
                    known[key] = own_rounding(site.computes, site.curve, dtype)
                if (rounding := known[key]) is not None:
                    name = str(dtype).removeprefix("torch.")
                    words += reasons.rounds_every_step(name, rounding.own, rounding.once)
            decision = replace(decision, reason=decision.reason + words)
        told.append(decision)
    return told
