"""Walk a model, probe it with hooks that derive, and decide for every activation whether inverting it pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from invact.deriving.derived_tensor import DerivedTensor
from invact.deriving.placing import places
from invact.errors.arguments import (
    Inputs,
    check_autocast,
    check_exact,
    check_few_bits,
    check_inputs,
    check_model,
    check_patterns,
    check_trainable_here,
    device_of,
)
from invact.kernels import Curve
from invact.ledger.floor import floor_bytes, not_derived, remains
from invact.ledger.ledger import Entry, Key
from invact.ledger.own_loss import OwnLoss, loss_bytes
from invact.patchers import example_inputs as make_inputs
from invact.planning.fusing import fused_norms
from invact.planning.walking import unpatched_modules, walk
from invact.probing.probe import Call, Observation, Stock, observe
from invact.pytorch.inside import has_fused_rms_norm
from invact.pytorch.one_thread import in_one_thread
from invact.recognition.curves import Rounding, own_rounding
from invact.recognition.found import Found
from invact.recognition.norms import Fusion, walk_norms
from invact.recognition.rewriting import Runner, Written
from invact.report.amounts import format_bytes
from invact.report.report import APPROXIMATE, DERIVE, INVERT, KEEP, NOTICEABLE, Report, Site
from invact.simulation.simulation import Setting, autocast_here
from invact.snapshot.snapshot import as_it_was
from invact.swapping.swaps import (
    LARGEST_INVERTED_ON_CPU,
    SMALLEST_INVERTED,
    ApproximateExpression,
    Approximation,
    Inversion,
    InvertedExpression,
    Swaps,
    as_on,
    inverted_in,
    swap_in,
)


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


def decide_for_device(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    device: str | torch.device = "cuda",
    autocast: torch.dtype | None = None,
    attention: str = "fused",
    exact: bool = False,
    few_bits: int | None = None,
    title: str = "",
) -> Decided:
    """`decide` for training on `device`, whether or not it is there; the model may be on any, or on meta."""
    check_inputs(example_inputs)
    check_few_bits(few_bits, exact)
    setting = Setting(torch.device(device), autocast, attention)
    decided = _decide(model, example_inputs, setting, exact=exact, few_bits=few_bits)
    decided.report.title = title
    return decided


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


def decide(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    autocast: torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
    everywhere: bool = False,
) -> Decided:
    """The plan in a form that can be applied; arguments and errors as of `plan`.

    Args:
        everywhere: for comparison: `few_bits` at every site that keeps more than its output, whoever else keeps
            what; nothing is inverted and nothing is derived.
    """
    check_model(model)
    check_trainable_here(model)
    check_autocast(autocast)
    check_patterns(include, exclude)
    check_exact(exact)
    check_few_bits(few_bits, exact)
    if example_inputs is None:
        example_inputs = make_inputs(model)
    check_inputs(example_inputs)
    device = device_of(model)
    setting = Setting(device, autocast or autocast_here(device))
    return _decide(model, example_inputs, setting, include, exclude, exact, few_bits, everywhere)


def _decide(
    model: nn.Module,
    inputs: Inputs,
    setting: Setting,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
    everywhere: bool = False,
) -> Decided:
    """Walk, probe, choose; then probe again with the choice applied, so that both totals are counts."""
    already = [site for path, module in model.named_modules() for site in _already_inverted(path, module)]
    with as_it_was(model), in_one_thread():
        found = list(walk(model))
        fusible = has_fused_rms_norm(setting.device) and not (exact or everywhere)
        norms = list(walk_norms(unpatched_modules(model))) if fusible else []
    allowed = {site.path for site in found if _allowed(site.path, include, exclude)}
    where = {} if everywhere else places(model, lambda path: _allowed(path, include, exclude))

    # With hooks on the whole, which see what else is kept where nothing is derived.
    on_the_whole = {"": False, **where}
    decisive = observe(
        model,
        inputs,
        setting,
        watch=[*found, *norms],
        checkpointing=False,
        computed=True,
        derived=True,
        derives=on_the_whole,
    )
    assert decisive.computed is not None
    obstacle = _why_not_derived(decisive)
    if obstacle is not None:
        where, norms = {}, []
        decisive = observe(model, inputs, setting, watch=found, checkpointing=False, computed=True)
        decisive.stock = Stock(decisive.entries, decisive.memory)
    assert decisive.stock is not None
    assert decisive.computed is not None
    choice = _Choice(found, decisive, allowed, exact, few_bits, everywhere)
    sites = choice.sites()
    chosen = {site.path: site.action for site in sites if site.action in (INVERT, APPROXIMATE)}
    decided = Decided(setting, Report(sites=[*sites, *already]), {}, {}, {})
    allowed_norms = {norm.path for norm in norms if _allowed(norm.path, include, exclude)}
    with in_one_thread():
        decided.report.fused = fused_norms(norms, choice.calls, allowed_norms, setting)
    chosen_norms = {norm.path for norm in decided.report.fused}
    decided.norms.update({norm.path: norm.fusion for norm in norms if norm.path in chosen_norms})
    for site in found:
        if site.path in chosen:
            how = choice.inversion(site) if chosen[site.path] == INVERT else choice.approximation(site)
            if site.written is None:
                decided.modules[site.path] = how
            else:
                runner = InvertedExpression(how) if isinstance(how, Inversion) else ApproximateExpression(how)
                decided.expressions.setdefault(site.module_path, {})[site.written] = runner
    if any(tensor.bytes_saved > 0 for tensor in decisive.derived):
        decided.derives.update(where)
    before = after = observe(model, inputs, setting, computed=True) if decisive.checkpoints else replace(
        decisive, entries=decisive.stock.entries, memory=decisive.stock.memory, derived=[]
    )  # fmt: skip
    if chosen or decided.derives or decided.norms:
        with decided.applied(model), as_on(setting.device):
            after = observe(model, inputs, setting, computed=True, derived=True)
    report = decided.report
    report.derived = [tensor for tensor in after.derived if tensor.bytes_saved > 0]
    if decided.derives and not report.derived and not decisive.checkpoints:  # inside regions it is not seen
        decided.derives.clear()
        if chosen or decided.norms:  # with hooks in place, sites of few elements have run stock code
            with decided.applied(model), as_on(setting.device):
                after = observe(model, inputs, setting, computed=True)
    # Expressions are told apart in the first pass only.
    report.sites = [_derived_site(site, [*decisive.derived, *report.derived]) for site in report.sites]
    _count_sites_made_again(
        report, {path: max(8 * call.bit_nbytes for call in calls) for path, calls in choice.calls.items()}
    )
    report.bytes_before, report.bytes_after = before.memory.total_bytes, after.memory.total_bytes
    assert before.computed is not None
    assert after.computed is not None
    # Never above what is reached: the floor leaves out that a sum may be worth more than its summands.
    reached = report.bytes_after + sum(site.bytes_saved for site in report.approximate)
    report.bytes_floor = min(floor_bytes(before.computed, before.entries), reached)
    report.remains = remains(after.computed, after.entries)
    report.not_derived = not_derived(after.computed, after.entries, after.why_kept)
    report.weight_cast_bytes = after.memory.weight_cast_bytes
    report.kept_by_class = dict(Counter(after.memory.by_class).most_common())
    report.loss_bytes_before = loss_bytes(before.loss, before.computed, before.entries)
    report.loss_bytes = loss_bytes(after.loss, after.computed, after.entries)
    report.setting = _in_words(setting, exact, few_bits, with_loss=before.loss is not None)
    report.notes = [*before.notes, *_notes(model, decisive, len(already), nothing_allowed=bool(found) and not allowed)]
    if obstacle is not None:
        report.notes.append(obstacle)
    if report.approximate and few_bits is not None:
        report.notes.append(_what_is_approximate(report, few_bits))
    if after.loss is not None and (note := _note_on_loss(report, after.loss)):
        report.notes.append(note)
    return decided


def _why_not_derived(decisive: Observation) -> str | None:
    """What of this model no recipe could be right beside, as a note; None if there is nothing."""
    if decisive.without_hooks:
        return (
            "nothing is derived, since the model enters torch.func or disable_saved_tensors_hooks in its forward, "
            "which refuse hooks on what autograd keeps; what is kept inside is not counted."
        )
    assert decisive.computed is not None
    if decisive.computed.changed_unseen:
        return (
            f"nothing is derived, since {decisive.computed.changed_unseen} changes a tensor of the graph in place "
            "where autograd does not see it, under no_grad or through detach or .data: made again, it would lack the "
            "change."
        )
    return None


def _derived_site(site: Site, derived: Sequence[DerivedTensor]) -> Site:
    """A site that is not inverted, but whose output is not kept either."""
    if site.action == KEEP and any(tensor.path == site.path for tensor in derived):
        return replace(site, action=DERIVE, reason=f"its output is made again from its input: {site.reason}")
    return site


def _count_sites_made_again(report: Report, elements: Mapping[str, int]) -> None:
    """What an inverted site makes again, as long as it is given few elements or many on a CPU, counts as the site's.

    Args:
        elements: the most that each site was given.
    """
    inverted = {site.path for site in report.inverted}
    saved: Counter[str] = Counter()
    for tensor in report.derived:
        if tensor.path in inverted:
            saved[tensor.path] += tensor.bytes_saved
    report.derived = [tensor for tensor in report.derived if tensor.path not in saved]
    few = f"; fewer than {SMALLEST_INVERTED:,} elements, as here, are made again instead"
    many = f"; more than {LARGEST_INVERTED_ON_CPU:,} elements, as here, are made again on a CPU instead"
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


# --- the choice ---------------------------------------------------------------------------------------


# Marks a site that keeps its output and no longer what it kept before.
_INVERTED = " (inverted)"

_NOBODY_ELSE = "nobody else keeps its output: one tensor would only take the place of another"


class _Choice:
    """Chooses the sites at which autograd keeps fewer bytes when they are inverted.

    Args:
        found: the sites of the model.
        observed: a pass with every checkpointed region run as ordinary code.
        allowed: the paths that `include` and `exclude` leave.
        exact: choose none.
        few_bits: of approximate derivatives where neither inverting nor deriving pays; None for none.
        everywhere: approximate wherever more than the output is kept, and invert nothing.
    """

    def __init__(
        self,
        found: Sequence[Found],
        observed: Observation,
        allowed: set[str],
        exact: bool,
        few_bits: int | None,
        everywhere: bool,
    ) -> None:
        self.found = found
        self.allowed = allowed
        self.exact = exact
        self.few_bits = few_bits
        self.everywhere = everywhere
        self.labels = observed.labels
        self.sizes: dict[Key, int] = {}
        self.keepers: dict[Key, set[str]] = {}
        self.casts: dict[Key, list[Entry]] = {}
        assert observed.stock is not None
        # What is kept once all is derived that can be, and by which site.
        self.kept_at: Counter[str] = Counter()
        self.kept_then: dict[Key, int] = {}
        self.keepers_then: dict[Key, set[str]] = {}
        self.read_then = observed.read
        for entry in observed.entries:
            self.kept_at[entry.path] += entry.nbytes
            self.kept_then[entry.key] = entry.nbytes
            self.keepers_then.setdefault(entry.key, set()).add(entry.path)
        for entry in observed.stock.entries:
            self.sizes[entry.key] = entry.nbytes
            self.keepers.setdefault(entry.key, set()).add(entry.path)
            if entry.cast_of is not None:
                self.casts.setdefault(entry.cast_of, []).append(entry)
        self.roundings: dict[tuple[str, Curve, torch.dtype], Rounding | None] = {}
        self.calls: dict[str, list[Call]] = {}
        for call in observed.calls:
            self.calls.setdefault(call.path, []).append(call)

    def sites(self) -> list[Site]:
        """One site per place found, in the model's order; expressions only where they are computed."""
        return [self._site(found) for found in self.found if found.written is None or found.path in self.calls]

    def _site(self, found: Found) -> Site:
        site = Site(found.path, str(found.curve), found.label, KEEP, "")
        obstacle = self._obstacle(found)
        if obstacle is not None:
            return replace(site, reason=obstacle)
        if self.everywhere and self.few_bits is not None:
            reason = f"{_in_steps(self.few_bits)}; asked for at every site"
            return self._approximated(replace(site, reason=reason), self._bytes_saved_in_steps(found, self.few_bits))
        saved = self._bytes_saved(found)
        if saved > 0 and (reason := self._derived_alike(found)):
            return replace(site, reason=reason)
        if saved > 0:
            reason = self._why_it_pays(found.path) + self._own_rounding(found)
            self._invert(found.path)
            return replace(site, action=INVERT, reason=reason, bytes_saved=saved)
        reason = self._why_it_does_not_pay(found.path)
        if reason == _NOBODY_ELSE and self.few_bits is not None:
            saved = self._bytes_saved_in_steps(found, self.few_bits)
            if saved > 0:
                reason = f"{_in_steps(self.few_bits)}; nobody else keeps its output"
                return self._approximated(replace(site, reason=reason), saved)
        return replace(site, reason=reason)

    def _approximated(self, site: Site, saved: int) -> Site:
        """From here on this site keeps its codes alone."""
        for keepers in self.keepers.values():
            keepers.discard(site.path)
        self.keepers = {key: keepers for key, keepers in self.keepers.items() if keepers}
        return replace(site, action=APPROXIMATE, bytes_saved=saved)

    def _bytes_saved_in_steps(self, found: Found, bits: int) -> int:
        """Bytes that this site alone keeps, and no recipe reads, once all is derived that can be; less its codes."""
        own = [key for key, keepers in self.keepers_then.items() if keepers == {found.path}]
        freed = sum(self.kept_then[key] for key in own if key not in self.read_then)
        return freed - bits * sum(call.bit_nbytes for call in self.calls[found.path] if call.needs_grad)

    def _obstacle(self, found: Found) -> str | None:
        """Why this site can not be inverted at all, or None."""
        if self.exact:
            return "exact gradients are asked for"
        calls = self.calls.get(found.path, [])
        if self._keeps_only_outputs(found.path):
            return "stock PyTorch already keeps only its output"
        if found.path not in self.allowed:
            return "left out by include or exclude"
        if found.settings is None:
            return "it computes with something that can change unseen"
        if found.replaced:
            return "somebody has put another forward on it, which would go on to call the stock one"
        if not calls:
            return "not called in this forward pass"
        if any(call.elsewhere for call in calls):
            return "called in another thread, where what autograd keeps is not seen"
        if not all(call.simple for call in calls):
            return "called with something other than one tensor"
        if not any(call.needs_grad for call in calls):
            return "no gradient flows through it here"
        if any(call.hooked for call in calls):
            return "a hook changes or exchanges its output"
        if any(call.changed_later for call in calls):
            return "its output is changed in place later"
        if len({call.in_place for call in calls}) > 1:
            return "it works in place in one call and not in another"
        return None

    def inversion(self, found: Found) -> Inversion:
        """How a chosen site is inverted."""
        assert found.settings is not None
        calls = self.calls[found.path]
        derivable = self.kept_at[found.path] <= self._outputs(found) + self._bits(found)
        derivable = derivable and not any(call.y_key in self.kept_then for call in calls if call.needs_grad)
        return Inversion(found.curve, found.settings, any(call.in_place for call in calls), derivable)

    def approximation(self, found: Found) -> Approximation:
        """How the derivative of a chosen site is approximated."""
        assert found.settings is not None
        assert self.few_bits is not None
        in_place = any(call.in_place for call in self.calls[found.path])
        return Approximation(found.curve, found.settings, self.few_bits, in_place)

    def _keeps_only_outputs(self, path: str) -> bool:
        own = {key for key, keepers in self.keepers.items() if path in keepers}
        return bool(own) and own <= {call.y_key for call in self.calls.get(path, [])}

    def _output_key(self, call: Call) -> Key:
        """The storage that is the output once inverted: the next layer's cast of it, if autocast made one."""
        if call.y_cast and call.y_key not in self.keepers:
            for entry in self.casts.get(call.y_key, []):
                if entry.nbytes == call.y_nbytes:
                    return entry.key
        return call.y_key

    def _bytes_saved(self, found: Found) -> int:
        """Bytes no longer kept, less those newly kept: the output where nobody else keeps it, and the bits."""
        path = found.path
        outputs = {self._output_key(call): call for call in self.calls[path] if call.needs_grad}
        own = {key for key, keepers in self.keepers.items() if keepers == {path}}
        freed = sum(self.sizes[key] for key in own)
        kept_anyway = {key for key in outputs if self.keepers.get(key, set()) - {path}}
        added = sum(call.y_nbytes for key, call in outputs.items() if key not in kept_anyway)
        return freed - added - self._bits(found)

    def _derived_alike(self, found: Found) -> str:
        """Why inverting would keep no less than deriving does; "" if it does."""
        outputs = {self._output_key(call): call for call in self.calls[found.path] if call.needs_grad}
        inverted = sum(call.y_nbytes for call in outputs.values())
        # Outputs may be kept all the same: of few elements, or where include and exclude leave them.
        kept = self.kept_at[found.path]
        kept += sum(call.y_nbytes for key, call in outputs.items() if key in self.kept_then)
        if kept < inverted:
            return "its input is not kept either"
        # An expression is inverted by other source than the author's: only where that saves more.
        bits = sum(call.bit_nbytes for call in outputs.values()) * found.curve.has_side
        if found.written is not None and kept <= inverted + bits:
            return "inverting an expression, it would keep no less"
        return ""

    def _outputs(self, found: Found) -> int:
        """Bytes of what a site gives."""
        return sum({call.y_key: call.y_nbytes for call in self.calls[found.path] if call.needs_grad}.values())

    def _bits(self, found: Found) -> int:
        """Bytes that it keeps beside that, inverted."""
        return sum(call.bit_nbytes for call in self.calls[found.path] if call.needs_grad) * found.curve.has_side

    def _invert(self, path: str) -> None:
        """From here on this site keeps its outputs, and what it kept before only if others do."""
        for keepers in self.keepers.values():
            keepers.discard(path)
        for call in self.calls[path]:
            if call.needs_grad:
                self.keepers.setdefault(self._output_key(call), set()).add(path + _INVERTED)
                self.sizes.setdefault(call.y_key, call.y_nbytes)
        self.keepers = {key: keepers for key, keepers in self.keepers.items() if keepers}

    def _others(self, path: str, keys: set[Key]) -> str:
        """The classes of the modules besides `path` that keep any of `keys`."""
        paths = {keeper for key in keys for keeper in self.keepers.get(key, set())} - {path}
        classes = {self.labels[keeper.removesuffix(_INVERTED)] for keeper in paths}
        return " and ".join(sorted(classes))

    def _why_it_pays(self, path: str) -> str:
        keys = {self._output_key(call) for call in self.calls[path] if call.needs_grad}
        others = self._others(path, keys)
        if not others:
            return "it keeps several tensors; inverted, its output alone"
        return f"{others} keeps its output anyway, so its input can go"

    def _own_rounding(self, found: Found) -> str:
        """What the reason should add where a site computes its curve in several steps, rounding each to 16 bits."""
        words = ""
        for dtype in sorted({call.dtype for call in self.calls[found.path] if call.dtype.itemsize == 2}, key=str):
            key = (found.label, found.curve, dtype)
            if key not in self.roundings:
                self.roundings[key] = own_rounding(found.computes, found.curve, dtype)
            if (rounding := self.roundings[key]) is not None:
                name = str(dtype).removeprefix("torch.")
                words += (
                    f"; in {name} it rounds every step and is {rounding.own:.1e} off float64, ours {rounding.once:.1e}"
                )
        return words

    def _why_it_does_not_pay(self, path: str) -> str:
        own = {key for key, keepers in self.keepers.items() if path in keepers}
        if not own:
            return "it keeps nothing here"
        if others := self._others(path, own):
            return f"{others} keeps its input anyway"
        return _NOBODY_ELSE


def _already_inverted(path: str, module: nn.Module) -> Iterator[Site]:
    label, sites = inverted_in(module)
    for method, curve, bits in sites:
        place = ".".join(part for part in (path, method and method + ":" + curve) if part)
        reason = "already approximate by an earlier patch" if bits else "already inverted by an earlier patch"
        yield Site(place, curve, label, KEEP, reason)


# --- arguments and words ------------------------------------------------------------------------------


def _allowed(path: str, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> bool:
    return (include is None or _matches(path, include)) and not (exclude is not None and _matches(path, exclude))


def _matches(path: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _in_words(setting: Setting, exact: bool, few_bits: int | None, *, with_loss: bool) -> str:
    words = [f"training on {setting.device.type}"]
    if setting.autocast is not None:
        words.append(f"autocast to {str(setting.autocast).removeprefix('torch.')}")
    if setting.device.type == "cuda":
        words.append("fused attention" if setting.attention == "fused" else "attention by matrix products")
    if exact:
        words.append("exact")
    if few_bits is not None:
        words.append(f"few_bits={few_bits}, approximate where nothing exact helps")
    words.append("with its loss" if with_loss else "without a loss")
    return ", ".join(words)


def _in_steps(bits: int) -> str:
    return f"approximate: its derivative in steps of {1 << bits} values (FewBit, arXiv 2202.00441)"


def _what_is_approximate(report: Report, bits: int) -> str:
    return (
        f"the gradients through {len(report.approximate)} of {len(report.sites)} sites are approximate, as "
        f"few_bits={bits} asks for: each is one of {1 << bits} slopes times the gradient of the output."
    )


def _note_on_loss(report: Report, loss: OwnLoss) -> str:
    """What the loss of a language model keeps of all that is kept after, and who has one that keeps less; or ""."""
    if not loss.vocabulary or report.loss_bytes < NOTICEABLE * report.bytes_after:
        return ""
    return (
        f"the loss keeps {format_bytes(report.loss_bytes)}, logits of {loss.tokens:,} tokens for {loss.vocabulary:,} "
        "entries. A loss taken in chunks of tokens would save nearly all of that, and the largest tensors of the turn "
        "from forward to backward: TRL's SFTTrainer has one, others are Liger Kernel's fused linear cross entropy and "
        "cut-cross-entropy."
    )


def _notes(model: nn.Module, decisive: Observation, already: int, *, nothing_allowed: bool) -> list[str]:
    notes = []
    if not model.training:
        notes.append(
            "counted in evaluation mode, in which the model is: its dropouts keep nothing; call model.train() before "
            "planning if you train in that mode."
        )
    if decisive.checkpoints:
        notes.append(
            f"{decisive.checkpoints} checkpointed regions keep nothing between forward and backward; bytes_saved of "
            "the sites inside tells by how much their own peak falls while they are recomputed."
        )
    if already:
        notes.append(f"{already} sites were inverted before; invact.unpatch(model) gives them back.")
    if nothing_allowed:
        notes.append("include and exclude leave no site: they are glob patterns over the paths of the sites.")
    return notes
