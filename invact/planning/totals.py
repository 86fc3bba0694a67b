"""What a plan comes to: bytes before and after, the floor, who keeps the rest; from two passes that were counted."""

from __future__ import annotations

from collections import Counter

from invact.ledger.floor import floor_bytes, not_derived, remains
from invact.ledger.own_loss import loss_bytes
from invact.probing.records import Observation
from invact.report.report import Report


def add_totals(report: Report, before: Observation, after: Observation) -> None:
    """Fills in what `report` says of both passes.

    Args:
        report: with its sites.
        before, after: with stock PyTorch, and with the plan applied; both with the record of what made what.
    """
    assert before.computed is not None
    assert after.computed is not None
    report.bytes_before, report.bytes_after = before.memory.total_bytes, after.memory.total_bytes
    # Never above what is reached: the floor leaves out that a sum may be worth more than its summands.
    reached = report.bytes_after + sum(site.bytes_saved for site in report.approximate)
    report.bytes_floor = min(floor_bytes(before.computed, before.entries), reached)
    report.remains = remains(after.computed, after.entries)
    report.not_derived = not_derived(after.computed, after.entries, after.why_kept)
    report.weight_cast_bytes = after.memory.weight_cast_bytes
    report.kept_by_class = dict(Counter(after.memory.by_class).most_common())
    report.loss_bytes_before = loss_bytes(before.loss, before.computed, before.entries)
    report.loss_bytes = loss_bytes(after.loss, after.computed, after.entries)
