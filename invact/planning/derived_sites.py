"""Sites whose outputs are made again as well: how that changes what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from invact.deriving.derived_tensor import DerivedTensor
from invact.planning.deciding import Decision
from invact.probing.records import Call
from invact.report import reasons
from invact.report.records import DERIVE, INVERT, KEEP, Site
from invact.swapping.inversion import LARGEST_INVERTED_ON_CPU, SMALLEST_INVERTED, is_made_again


def with_derived(sites: Sequence[Site], derived: Sequence[DerivedTensor]) -> list[Site]:
    """The sites; of one that is not inverted, but whose output is not kept either, the action is "derive"."""
    paths = {tensor.path for tensor in derived}
    return [
        replace(site, action=DERIVE, reason=reasons.made_again(site.reason))
        if site.action == KEEP and site.path in paths
        else site
        for site in sites
    ]


def counted_at_inverted_sites(
    decisions: Sequence[Decision],
    derived: Sequence[DerivedTensor],
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
) -> tuple[list[Decision], list[DerivedTensor]]:
    """What an inverted site makes again, where it is given few elements or many on a CPU, counts as the site's.

    Args:
        derived: what is made again once all of it is applied.
        calls: of each site, by path.
        device: that is planned for.

    Returns:
        The decisions with the bytes that they save so, and with why; and the other derived tensors.
    """
    inverted = {decision.site.path for decision in decisions if decision.action == INVERT}
    saved: Counter[str] = Counter()
    for tensor in derived:
        if tensor.path in inverted:
            saved[tensor.path] += tensor.bytes_saved
    counted = [
        _counted(decision, calls[decision.site.path], device, saved[decision.site.path])
        if decision.site.path in saved
        else decision
        for decision in decisions
    ]
    return counted, [tensor for tensor in derived if tensor.path not in saved]


def _counted(decision: Decision, calls: Sequence[Call], device: torch.device, saved: int) -> Decision:
    """Of a site of which these bytes are saved by making its output again in some of its calls, or in all."""
    with_gradient = [call for call in calls if call.needs_grad]
    again = [call for call in with_gradient if is_made_again(call.numel, device)]
    words = ""
    if any(call.numel < SMALLEST_INVERTED for call in again):
        words += reasons.few_made_again(SMALLEST_INVERTED)
    if any(call.numel > LARGEST_INVERTED_ON_CPU for call in again):
        words += reasons.many_made_again(LARGEST_INVERTED_ON_CPU)
    if len(again) < len(with_gradient):  # what the others save stays
        side = decision.site.curve.has_side
        saved += decision.bytes_saved - sum(call.y_nbytes - side * call.bit_nbytes for call in again)
    return replace(decision, reason=decision.reason + words, bytes_saved=saved)
