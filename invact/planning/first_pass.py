"""The pass that shows what is kept where something may be done, by stock PyTorch and with all derived that can be."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from invact.errors.checks import Inputs
from invact.planning.places import Places
from invact.probing.probe import observe
from invact.probing.records import Observation, Stock
from invact.report import notes
from invact.simulation.setting import Setting


def first_pass(
    model: nn.Module, inputs: Inputs, setting: Setting, found: Places
) -> tuple[Observation, Places, str | None]:
    """A pass with every checkpointed region run as ordinary code, and hooks that derive wherever they may be set.

    Returns:
        What was kept so, and in its `stock` what stock PyTorch would have kept; the places that are left, without any
        to derive at where no recipe could be right; and a note that says why not, or None.
    """
    # With hooks on the whole, which see what else is kept where nothing is derived; they derive if the whole may.
    on_the_whole = {"": False, **found.derives}
    seen = observe(
        model,
        inputs,
        setting,
        watch=[*found.sites, *found.norms],
        run_checkpoints=False,
        record_operators=True,
        record_derived=True,
        hooks_at=on_the_whole,
    )
    why_not = _why_not_derived(seen)
    if why_not is not None:
        found = replace(found, derives={}, norms=[])
        seen = observe(model, inputs, setting, watch=found.sites, run_checkpoints=False, record_operators=True)
        seen.stock = Stock(seen.entries, seen.memory)
    return seen, found, why_not


def _why_not_derived(seen: Observation) -> str | None:
    """What of this model no recipe could be right beside, as a note; None if there is nothing."""
    assert seen.computed is not None
    if seen.without_hooks:
        return notes.HOOKS_REFUSED
    return notes.changed_unseen(seen.computed.changed_unseen) if seen.computed.changed_unseen else None
