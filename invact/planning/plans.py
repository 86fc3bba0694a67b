"""From a model to a plan that can be applied: walk, probe, decide, probe again with it applied, report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from invact.errors.checks import (
    Inputs,
    check_inputs,
    check_model,
    check_trainable_here,
)
from invact.patchers import example_inputs as make_inputs
from invact.planning.deciding import Decision, Pass, decide_sites
from invact.planning.first_pass import Places, first_pass, walked
from invact.planning.fusing import fused_norms
from invact.planning.made_again import count_at_inverted_sites, with_derived
from invact.planning.options import Options
from invact.planning.rounding import with_roundings
from invact.planning.totals import add_totals
from invact.probing.probe import observe
from invact.probing.records import Observation
from invact.pytorch.one_thread import in_one_thread
from invact.recognition.norms import Fusion
from invact.recognition.rewriting import Runner
from invact.recognition.written import Written
from invact.report import notes
from invact.report.records import INVERT, KEEP, FusedNorm, Site
from invact.report.report import Report
from invact.report.setting import training_in_words
from invact.simulation.autocast import autocast_here
from invact.simulation.setting import Setting, device_of
from invact.swapping.approximation import Approximation
from invact.swapping.inversion import Inversion
from invact.swapping.planned_device import as_on
from invact.swapping.rewritten import in_an_expression
from invact.swapping.swaps import Swaps, swap_in


def plan(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    autocast: torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
) -> Report:
    """What `invact.patch` would do to `model`, and what that would save; the model is not changed.

    Args:
        model: planned for training in the mode in which it is: one left in `eval()`, as `from_pretrained` returns it,
            is counted without dropout, which the report notes.
        example_inputs: a dict is passed as keyword arguments, a tuple as positional ones. Only shapes, dtypes
            and which inputs there are matter. Without it a Hugging Face, timm or OpenCLIP model gets inputs made
            from its configuration, and a Hugging Face model what it computes its loss with.
        autocast: the dtype of torch.autocast in training, or None: as it is where this is called, which is mostly off.
        include: glob patterns over paths; only these sites may be inverted, and only inside these modules is derived.
        exclude: glob patterns over paths; these sites are kept, and inside these modules nothing is derived.
        exact: nothing is inverted, activations are derived instead, and the gradients are bit for bit the stock ones.
        few_bits: 1 to 4: where neither inverting nor deriving pays, this many bits per element take the place of the
            activation's input, and its gradient is approximate; see `invact.inverting.few_bits`. None: nowhere.

    Raises:
        TypeError: `model` is no module, or an argument is of the wrong kind.
        ValueError: `few_bits` is another number or comes with `exact`; the model belongs to no known library and no
            inputs were given; or it can not be trained as it is: inside `torch.inference_mode`, with lazy layers that
            have no shape yet, with offloaded parameters.
        LeftoverError: a hook or a cache holds on to what it was shown; see `invact.simulation.leftovers`.
        TimeoutError: a forward pass of the model takes longer than `invact.probing.TIME_LIMIT`.
        Exception: the model's own, if its forward fails with these inputs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
        >>> report = plan(model, (torch.randn(8, 64),))
        >>> [(site.path, site.action) for site in report.sites]
        [('1', 'invert')]
    """
    return decide(
        model, example_inputs, autocast=autocast, include=include, exclude=exclude, exact=exact, few_bits=few_bits
    ).report


@dataclass(frozen=True)
class Decided:
    """A report, and what to swap to make it true."""

    setting: Setting
    report: Report
    modules: dict[str, Inversion | Approximation]  # by path
    expressions: dict[str, dict[Written, Runner]]  # by the path of the module in whose methods they stand
    derives: dict[str, bool]  # by the path of the module, whether tensors are derived inside it
    norms: dict[str, Fusion] = field(default_factory=dict)  # by path
    checkpointed: list[str] = field(default_factory=list)  # the paths of blocks

    def apply(self, model: nn.Module) -> Swaps:
        """Does at each site what the report says, fuses norms, sets hooks, checkpoints; or, after an error, nothing."""
        return swap_in(model, self.modules, self.expressions, self.derives, self.norms, self.checkpointed)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`apply` for the length of a block."""
        swaps = self.apply(model)
        try:
            yield
        finally:
            swaps.undo()


def decide(model: nn.Module, example_inputs: Inputs | None = None, **options: Any) -> Decided:
    """The plan in a form that can be applied.

    Args:
        model, example_inputs: as of `plan`, whose errors are raised.
        options: the arguments of `invact.planning.options.Options`.
    """
    check_model(model)
    check_trainable_here(model)
    asked = Options(**options)
    if example_inputs is None:
        example_inputs = make_inputs(model)
    check_inputs(example_inputs)
    device = device_of(model)
    return decide_in(model, example_inputs, Setting(device, asked.autocast or autocast_here(device)), asked)


def decide_for_device(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    device: str | torch.device = "cuda",
    attention: str = "fused",
    title: str = "",
    **options: Any,
) -> Decided:
    """`decide` for training on `device`, whether or not it is there; the model may be on any, or on meta."""
    check_inputs(example_inputs)
    asked = Options(**options)
    decided = decide_in(model, example_inputs, Setting(torch.device(device), asked.autocast, attention), asked)
    decided.report.title = title
    return decided


def decide_in(model: nn.Module, inputs: Inputs, setting: Setting, options: Options) -> Decided:
    """Walk, probe, decide; then probe again with that applied, so that both totals are counts."""
    found = walked(model, setting, options)
    first, found, why_not_derived = first_pass(model, inputs, setting, found)
    seen = Pass.of(first)
    decisions = with_roundings(decide_sites(found.sites, seen, options), seen.calls)
    allowed_norms = {norm.path for norm in found.norms if options.allow(norm.path)}
    with in_one_thread():
        fused = fused_norms(found.norms, seen.calls, allowed_norms, setting)

    decided = _decided(setting, decisions, found, fused, first)
    decided, before, after = _counted(model, inputs, decided, first)
    report = decided.report
    report.derived = [tensor for tensor in after.derived if tensor.bytes_saved > 0]
    # Expressions are told apart in the first pass only.
    report.sites = with_derived(report.sites, [*first.derived, *report.derived])
    count_at_inverted_sites(report, {path: max(8 * call.bit_nbytes for call in c) for path, c in seen.calls.items()})
    add_totals(report, before, after)
    report.setting = _in_words(setting, options, before)
    report.notes = [*before.notes, *_notes(model, first, found, options)]
    report.notes += [] if why_not_derived is None else [why_not_derived]
    report.notes += _notes_on_result(report, options, after)
    return decided


def _decided(
    setting: Setting, decisions: Sequence[Decision], found: Places, fused: list[FusedNorm], first: Observation
) -> Decided:
    """What is to be swapped; of the report, what was decided."""
    modules: dict[str, Inversion | Approximation] = {}
    expressions: dict[str, dict[Written, Runner]] = {}
    for decision in decisions:
        if decision.action == KEEP:
            continue
        site, how = decision.site, _how(decision)
        if site.written is None:
            modules[site.path] = how
        else:
            expressions.setdefault(site.module_path, {})[site.written] = in_an_expression(how)
    saves = any(tensor.bytes_saved > 0 for tensor in first.derived)
    fusions = {norm.path: norm.fusion for norm in found.norms}
    report = Report(sites=[*map(_site, decisions), *found.already], fused=fused)
    return Decided(
        setting,
        report,
        modules,
        expressions,
        derives=found.derives if saves else {},
        norms={norm.path: fusions[norm.path] for norm in fused},
    )


def _site(decision: Decision) -> Site:
    site = decision.site
    return Site(site.path, str(site.curve), site.label, decision.action, decision.reason, decision.bytes_saved)


def _how(decision: Decision) -> Inversion | Approximation:
    site = decision.site
    assert site.settings is not None
    if decision.action == INVERT:
        return Inversion(site.curve, site.settings, decision.in_place, decision.derivable)
    assert decision.bits is not None
    return Approximation(site.curve, site.settings, decision.bits, decision.in_place)


def _counted(
    model: nn.Module, inputs: Inputs, decided: Decided, first: Observation
) -> tuple[Decided, Observation, Observation]:
    """What is kept before it is applied and after; and what is decided, without hooks if these derive nothing."""
    assert first.stock is not None
    if first.checkpoints:
        before = observe(model, inputs, decided.setting, computed=True)
    else:
        before = replace(first, entries=first.stock.entries, memory=first.stock.memory, derived=[])
    after = before
    swaps_anything = bool(decided.modules or decided.expressions or decided.norms)
    if swaps_anything or decided.derives:
        after = observed_with(decided, model, inputs)
    derives_nothing = not any(tensor.bytes_saved > 0 for tensor in after.derived)
    if decided.derives and derives_nothing and not first.checkpoints:  # inside regions it is not seen
        decided = replace(decided, derives={})
        if swaps_anything:  # with hooks in place, sites of few elements have run stock code
            after = observed_with(decided, model, inputs, derived=False)
    return decided, before, after


def observed_with(decided: Decided, model: nn.Module, inputs: Inputs, *, derived: bool = True) -> Observation:
    """A pass with all of it applied, as on the device that was decided for; `derived` as of `observe`."""
    with decided.applied(model), as_on(decided.setting.device):
        return observe(model, inputs, decided.setting, computed=True, derived=derived)


def _in_words(setting: Setting, options: Options, before: Observation) -> str:
    return training_in_words(
        setting.device.type,
        None if setting.autocast is None else str(setting.autocast).removeprefix("torch."),
        setting.attention,
        exact=options.exact,
        few_bits=options.few_bits,
        with_loss=before.loss is not None,
    )


def _notes(model: nn.Module, first: Observation, found: Places, options: Options) -> list[str]:
    said = []
    if not model.training:
        said.append(notes.EVALUATION_MODE)
    if first.checkpoints:
        said.append(notes.checkpointed_regions(first.checkpoints))
    if found.already:
        said.append(notes.already_patched(len(found.already)))
    if found.sites and not any(options.allow(site.path) for site in found.sites):
        said.append(notes.NO_SITE_LEFT)
    return said


def _notes_on_result(report: Report, options: Options, after: Observation) -> list[str]:
    said = []
    if report.approximate and options.few_bits is not None:
        said.append(notes.what_is_approximate(report, options.few_bits))
    if after.loss is not None and (note := notes.on_loss(report, after.loss.tokens, after.loss.vocabulary)):
        said.append(note)
    return said
