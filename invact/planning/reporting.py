"""From what was decided and counted to a report: its sites, bytes and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from invact.ledger.floor import floor_bytes, not_derived, remains
from invact.ledger.own_loss import loss_bytes
from invact.planning.deciding import Decision, Pass
from invact.planning.derived_sites import counted_at_inverted_sites, with_derived
from invact.planning.options import Options
from invact.planning.places import Places
from invact.probing.records import Observation
from invact.report import notes
from invact.report.records import APPROXIMATE, FusedNorm, Site
from invact.report.report import Report
from invact.report.setting_in_words import training_in_words
from invact.simulation.setting import Setting


@dataclass(frozen=True)
class Counted:
    """The passes that were counted: the first, with hooks wherever they may be; by stock PyTorch; and as planned."""

    first: Observation
    before: Observation
    after: Observation


def told(
    decisions: Sequence[Decision],
    fused: list[FusedNorm],
    seen: Pass,
    counted: Counted,
    found: Places,
    setting: Setting,
    options: Options,
) -> Report:
    """The report, but for the notes."""
    before, after = counted.before, counted.after
    assert before.computed is not None
    assert after.computed is not None
    derived = [tensor for tensor in after.derived if tensor.bytes_saved > 0]
    # Expressions are told apart in the first pass only.
    seen_derived = [*counted.first.derived, *derived]
    decisions, derived = counted_at_inverted_sites(decisions, derived, seen.calls, setting.device)
    approximated = sum(decision.bytes_saved for decision in decisions if decision.action == APPROXIMATE)
    return Report(
        sites=with_derived([*map(_site, decisions), *found.already], seen_derived),
        fused=fused,
        derived=derived,
        bytes_before=before.memory.total_bytes,
        bytes_after=after.memory.total_bytes,
        # Never above what is reached: the floor leaves out that a sum may be worth more than its summands.
        bytes_floor=min(floor_bytes(before.computed, before.entries), after.memory.total_bytes + approximated),
        remains=remains(after.computed, after.entries),
        not_derived=not_derived(after.computed, after.entries, after.why_kept),
        weight_cast_bytes=after.memory.weight_cast_bytes,
        kept_by_class=dict(Counter(after.memory.by_class).most_common()),
        loss_bytes_before=loss_bytes(before.loss, before.computed, before.entries),
        loss_bytes=loss_bytes(after.loss, after.computed, after.entries),
        setting=training_in_words(
            setting.device.type,
            None if setting.autocast is None else str(setting.autocast).removeprefix("torch."),
            setting.attention,
            exact=options.exact,
            few_bits=options.few_bits,
            with_loss=before.loss is not None,
        ),
    )


def _site(decision: Decision) -> Site:
    site = decision.site
    return Site(site.path, str(site.curve), site.label, decision.action, decision.reason, decision.bytes_saved)


def notes_on(
    report: Report, model: nn.Module, counted: Counted, found: Places, options: Options, why_not_derived: str | None
) -> list[str]:
    """What else the reader should know, in the order in which it came to light."""
    said = list(dict.fromkeys([*counted.before.notes, *counted.after.notes]))
    if not model.training:
        said.append(notes.EVALUATION_MODE)
    if counted.first.checkpoints:
        said.append(notes.checkpointed_regions(counted.first.checkpoints))
    if found.already:
        said.append(notes.already_patched(len(found.already)))
    elif found.patched:
        said.append(notes.PATCHED_BEFORE)
    if found.sites and not any(options.allow(site.path) for site in found.sites):
        said.append(notes.NO_SITE_LEFT)
    if why_not_derived is not None:
        said.append(why_not_derived)
    if report.approximate and options.few_bits is not None:
        said.append(notes.what_is_approximate(report, options.few_bits))
    loss = counted.after.loss
    if loss is not None and (note := notes.on_loss(report, loss.tokens, loss.vocabulary)):
        said.append(note)
    return said
