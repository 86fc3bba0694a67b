"""Where something may be done in a model, and the pass that shows what is kept there, by stock PyTorch and derived."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from invact.deriving.hooked_modules import places
from invact.errors.checks import Inputs
from invact.planning.options import Options
from invact.planning.walking import unpatched_modules, walk
from invact.probing.probe import observe
from invact.probing.records import Observation, Stock
from invact.pytorch.one_thread import in_one_thread
from invact.pytorch.operators import has_fused_rms_norm
from invact.recognition.found import Found
from invact.recognition.norms_in_steps import FoundNorm, walk_norms
from invact.report import notes, reasons
from invact.report.records import KEEP, Site
from invact.simulation.setting import Setting
from invact.snapshot.snapshot import as_it_was
from invact.swapping.patched import Patched, inverted_in


@dataclass(frozen=True)
class Places:
    """What a walk through a model has found.

    Attributes:
        sites: where a pointwise activation is computed.
        norms: those that are written out in steps and may be run by one operator.
        derives: at which modules hooks are to be set; see `invact.deriving.hooked_modules`.
        already: sites that an earlier patch has changed.
        patched: whether an earlier patch has changed anything, be it that it set hooks alone.
    """

    sites: list[Found]
    norms: list[FoundNorm]
    derives: dict[str, bool]
    already: list[Site]
    patched: bool = False


def walked(model: nn.Module, setting: Setting, options: Options) -> Places:
    """Everything in `model` at which something may be done, as far as that can be told without running it."""
    already = [site for path, module in model.named_modules() for site in _already_patched(path, module)]
    with as_it_was(model), in_one_thread():
        sites = list(walk(model))
        fusible = has_fused_rms_norm(setting.device) and not (options.exact or options.everywhere)
        norms = list(walk_norms(unpatched_modules(model))) if fusible else []
    derives = {} if options.everywhere else places(model, options.allow)
    return Places(sites, norms, derives, already, any(isinstance(module, Patched) for module in model.modules()))


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


def _already_patched(path: str, module: nn.Module) -> Iterator[Site]:
    label, sites = inverted_in(module)
    for method, curve, bits in sites:
        place = ".".join(part for part in (path, method and method + ":" + curve) if part)
        yield Site(place, curve, label, KEEP, reasons.ALREADY_APPROXIMATE if bits else reasons.ALREADY_INVERTED)
