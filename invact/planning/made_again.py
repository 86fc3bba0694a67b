"""Sites whose outputs are made again as well: how that changes what is said of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from invact.deriving.derived_tensor import DerivedTensor
from invact.report import reasons
from invact.report.records import DERIVE, KEEP, Site
from invact.report.report import Report
from invact.swapping.inversion import LARGEST_INVERTED_ON_CPU, SMALLEST_INVERTED


def with_derived(sites: Sequence[Site], derived: Sequence[DerivedTensor]) -> list[Site]:
    """The sites; of one that is not inverted, but whose output is not kept either, the action is "derive"."""
    paths = {tensor.path for tensor in derived}
    return [
        replace(site, action=DERIVE, reason=reasons.made_again(site.reason))
        if site.action == KEEP and site.path in paths
        else site
        for site in sites
    ]


def count_at_inverted_sites(report: Report, elements: Mapping[str, int]) -> None:
    """What an inverted site makes again, as long as it is given few elements or many on a CPU, counts as the site's.

    Args:
        elements: the most that each site was given, by path.
    """
    inverted = {site.path for site in report.inverted}
    saved: Counter[str] = Counter()
    for tensor in report.derived:
        if tensor.path in inverted:
            saved[tensor.path] += tensor.bytes_saved
    report.derived = [tensor for tensor in report.derived if tensor.path not in saved]
    few = reasons.few_made_again(SMALLEST_INVERTED)
    many = reasons.many_made_again(LARGEST_INVERTED_ON_CPU)
    report.sites = [
        replace(
            site,
            reason=site.reason + (few if elements[site.path] < SMALLEST_INVERTED else many),
            bytes_saved=saved[site.path],
        )
        if site.path in saved
        else site
        for site in report.sites
    ]
