"""From a model to a plan that can be applied: walk, probe, decide, probe again with that applied, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from invact.errors.checks import Inputs, check_inputs, check_model, check_trainable_here
from invact.patchers import example_inputs as make_inputs
from invact.planning.changes import Changes, changes_for
from invact.planning.deciding import Pass, decide_sites
from invact.planning.first_pass import first_pass
from invact.planning.fusing import fused_norms
from invact.planning.options import Options
from invact.planning.places import walked
from invact.planning.reporting import Counted, notes_on, told
from invact.planning.rounding_notes import with_roundings
from invact.probing.probe import observe
from invact.probing.records import Observation
from invact.pytorch.one_thread import in_one_thread
from invact.report.report import Report
from invact.simulation.autocast import autocast_here
from invact.simulation.setting import Setting, device_of


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
        include: glob patterns over paths; only these sites may be inverted, and only inside these modules is derived. A
            list of paths will do, such as `[path for path, m in model.named_modules() if isinstance(m, nn.GELU)]`.
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


@dataclass(kw_only=True)
class Decided(Changes):
    """What is to be changed in a model, and the report that this makes true; `invact.fit` adds to both."""

    report: Report


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
    """Walk, probe, decide; probe again with that applied, so that both totals are counts; report."""
    found = walked(model, setting, options)
    first, found, why_not_derived = first_pass(model, inputs, setting, found)

    seen = Pass.of(first)
    decisions = with_roundings(decide_sites(found.sites, seen, options), seen.calls)
    allowed_norms = {norm.path for norm in found.norms if options.allow(norm.path)}
    with in_one_thread():
        fused = fused_norms(found.norms, seen.calls, allowed_norms, setting)
    changes = changes_for(decisions, found, fused, setting, derives=_derives(first))

    before = _before(model, inputs, first, setting)
    after = changes.observed(model, inputs, record_operators=True, record_derived=True) if changes else before
    if changes.derives and not _derives(after) and not first.checkpoints:  # inside regions it is not seen
        changes = replace(changes, derives={})
        if changes:  # with hooks in place, sites of few elements have run stock code
            after = changes.observed(model, inputs, record_operators=True)

    counted = Counted(first, before, after)
    report = told(decisions, fused, seen, counted, found, setting, options)
    report.notes = notes_on(report, model, counted, found, options, why_not_derived)
    return Decided(**vars(changes), report=report)


def _derives(seen: Observation) -> bool:
    return any(tensor.bytes_saved > 0 for tensor in seen.derived)


def _before(model: nn.Module, inputs: Inputs, first: Observation, setting: Setting) -> Observation:
    """What stock PyTorch keeps, checkpointed regions run as they are."""
    assert first.stock is not None
    if first.checkpoints:
        return observe(model, inputs, setting, record_operators=True)
    return replace(first, entries=first.stock.entries, memory=first.stock.memory, derived=[])
