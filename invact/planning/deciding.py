"""Decides for every activation whether inverting it pays: functions over records of a pass, which need no model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from invact.ledger.entries import Key
from invact.planning.keepers import Keepers
from invact.planning.options import Options
from invact.probing.records import Call, Observation
from invact.recognition.found_site import Found
from invact.report import reasons
from invact.report.records import APPROXIMATE, INVERT, KEEP


@dataclass(frozen=True)
class Decision:
    """What is done at one site.

    Attributes:
        action: "invert", "approximate" or "keep"; where it is kept, its output may be derived all the same.
        reason: why, in words of `invact.report.reasons`.
        bytes_saved: fewer bytes kept for backward.
        in_place: the output takes the memory of the input.
        derivable: where tensors are derived, the stock code would keep no more than the inverted one.
        bits: kept per element, where the derivative is approximate.
    """

    site: Found
    action: str
    reason: str
    bytes_saved: int = 0
    in_place: bool = False
    derivable: bool = True
    bits: int | None = None


@dataclass(frozen=True)
class Pass:
    """What one forward pass kept, as far as decisions go by it.

    Attributes:
        calls: of each site, by path.
        classes: the names of the classes of the modules that keep anything, by path.
        stock: who keeps what with stock PyTorch; while decisions are made, with what has been decided so far.
        derived: who keeps what once all is derived that can be.
        read: the storages that derived tensors are made again from.
    """

    calls: Mapping[str, Sequence[Call]]
    classes: Mapping[str, str]
    stock: Keepers
    derived: Keepers
    read: Collection[Key] = field(default_factory=frozenset)

    @classmethod
    def of(cls, observed: Observation) -> Pass:
        """From a pass in which it was recorded what stock PyTorch would keep."""
        assert observed.stock is not None
        return cls(
            calls_by_path(observed),
            observed.labels,
            Keepers(observed.stock.entries),
            Keepers(observed.entries),
            observed.read,
        )


def calls_by_path(observed: Observation) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = {}
    for call in observed.calls:
        calls.setdefault(call.path, []).append(call)
    return calls


def decide_sites(sites: Sequence[Found], seen: Pass, options: Options) -> list[Decision]:
    """What is done at each site, in the model's order; expressions that were not computed are left out.

    One decision tells on the next: what an inverted site keeps is kept anyway by then.
    """
    seen = replace(seen, stock=seen.stock.copy())
    decisions = []
    for site in sites:
        if site.written is not None and site.path not in seen.calls:
            continue
        decision = _decide_site(site, seen, options)
        if decision.action != KEEP:
            outputs = _outputs(site, seen) if decision.action == INVERT else {}
            seen.stock.release(site.path)
            for key, call in outputs.items():
                seen.stock.keep(site.path + _INVERTED, key, call.y_nbytes)
        decisions.append(decision)
    return decisions


# Marks a site that keeps its output and no longer what it kept before.
_INVERTED = " (inverted)"


def _decide_site(site: Found, seen: Pass, options: Options) -> Decision:
    obstacle = _obstacle(site, seen, options)
    if obstacle is not None:
        return Decision(site, KEEP, obstacle)
    in_place = any(call.in_place for call in seen.calls[site.path])
    bits = options.few_bits
    if options.everywhere and bits is not None:
        saved = _bytes_saved_in_steps(site, seen, bits)
        return Decision(site, APPROXIMATE, reasons.in_steps_everywhere(bits), saved, in_place, bits=bits)
    saved = _bytes_saved(site, seen)
    if saved > 0 and (alike := _derived_alike(site, seen)) is not None:
        return Decision(site, KEEP, alike)
    if saved > 0:
        return Decision(site, INVERT, _why_it_pays(site, seen), saved, in_place, _is_derivable(site, seen))
    reason = _why_it_does_not_pay(site, seen)
    if reason == reasons.NOBODY_ELSE and bits is not None:
        saved = _bytes_saved_in_steps(site, seen, bits)
        if saved > 0:
            reason = reasons.in_steps_since_nobody_else(bits)
            return Decision(site, APPROXIMATE, reason, saved, in_place, bits=bits)
    return Decision(site, KEEP, reason)


def _obstacle(site: Found, seen: Pass, options: Options) -> str | None:
    """Why this site can not be inverted at all, or None; of several reasons the first, which is told."""
    calls = seen.calls.get(site.path, [])
    own = seen.stock.of(site.path)
    in_turn = (
        (options.exact, reasons.EXACT),
        (bool(own) and own <= {call.y_key for call in calls}, reasons.KEEPS_ONLY_OUTPUTS),
        (not options.allow(site.path), reasons.LEFT_OUT),
        (site.dependencies is None, reasons.CHANGES_UNSEEN),
        (site.replaced, reasons.REPLACED),
        (not calls, reasons.NOT_CALLED),
        (any(call.elsewhere for call in calls), reasons.ELSEWHERE),
        (not all(call.simple for call in calls), reasons.NOT_ONE_TENSOR),
        (not any(call.needs_grad for call in calls), reasons.NO_GRADIENT),
        (any(call.hooked for call in calls), reasons.HOOKED),
        (any(call.changed_later for call in calls), reasons.CHANGED_LATER),
        (len({call.in_place for call in calls}) > 1, reasons.IN_PLACE_AT_TIMES),
    )
    return next((reason for is_so, reason in in_turn if is_so), None)


# --- bytes --------------------------------------------------------------------------------------------


def _bytes_saved(site: Found, seen: Pass) -> int:
    """Bytes no longer kept, less those newly kept: the output where nobody else keeps it, and the bits."""
    freed = sum(seen.stock.sizes[key] for key in seen.stock.alone(site.path))
    outputs = _outputs(site, seen)
    added = sum(call.y_nbytes for key, call in outputs.items() if not seen.stock.besides(site.path, {key}))
    return freed - added - _bytes_of_bits(site, seen)


def _bytes_saved_in_steps(site: Found, seen: Pass, bits: int) -> int:
    """Bytes that this site alone keeps, and no recipe reads, once all is derived that can be; less its codes."""
    own = seen.derived.alone(site.path)
    freed = sum(seen.derived.sizes[key] for key in own if key not in seen.read)
    return freed - bits * sum(call.bit_nbytes for call in _calls_with_gradient(site, seen))


def _bytes_kept_with_derived(site: Found, seen: Pass) -> int:
    return sum(seen.derived.sizes[key] for key in seen.derived.of(site.path))


def _bytes_of_bits(site: Found, seen: Pass) -> int:
    """What it keeps beside its outputs, inverted."""
    return sum(call.bit_nbytes for call in _calls_with_gradient(site, seen)) * site.curve.has_side


def _derived_alike(site: Found, seen: Pass) -> str | None:
    """Why inverting would keep no less than deriving does; None if it keeps less."""
    outputs = _outputs(site, seen)
    inverted = sum(call.y_nbytes for call in outputs.values())
    # Outputs may be kept all the same: of few elements, or where include and exclude leave them.
    kept = _bytes_kept_with_derived(site, seen)
    kept += sum(call.y_nbytes for key, call in outputs.items() if key in seen.derived.by_key)
    if kept < inverted:
        return reasons.INPUT_NOT_KEPT_EITHER
    # An expression is inverted by other source than the author's: only where that saves more.
    bits = sum(call.bit_nbytes for call in outputs.values()) * site.curve.has_side
    if site.written is not None and kept <= inverted + bits:
        return reasons.EXPRESSION_NO_LESS
    return None


def _is_derivable(site: Found, seen: Pass) -> bool:
    """Whether the stock code keeps no more than the inverted one where its output is made again."""
    calls = _calls_with_gradient(site, seen)
    outputs = sum({call.y_key: call.y_nbytes for call in calls}.values())
    if _bytes_kept_with_derived(site, seen) > outputs + _bytes_of_bits(site, seen):
        return False
    return not any(call.y_key in seen.derived.by_key for call in calls)


def _calls_with_gradient(site: Found, seen: Pass) -> list[Call]:
    return [call for call in seen.calls[site.path] if call.needs_grad]


def _outputs(site: Found, seen: Pass) -> dict[Key, Call]:
    """The calls by the storage of what each keeps once inverted."""
    return {_output_key(call, seen): call for call in _calls_with_gradient(site, seen)}


def _output_key(call: Call, seen: Pass) -> Key:
    """The storage that is the output once inverted: the next layer's cast of it, if autocast made one."""
    if call.y_cast and call.y_key not in seen.stock.by_key:
        return seen.stock.cast(call.y_key, call.y_nbytes) or call.y_key
    return call.y_key


# --- why ----------------------------------------------------------------------------------------------


def _why_it_pays(site: Found, seen: Pass) -> str:
    others = _others(site, seen, _outputs(site, seen))
    return reasons.others_keep_its_output(others) if others else reasons.SEVERAL_TENSORS


def _why_it_does_not_pay(site: Found, seen: Pass) -> str:
    own = seen.stock.of(site.path)
    if not own:
        return reasons.KEEPS_NOTHING
    others = _others(site, seen, own)
    return reasons.others_keep_its_input(others) if others else reasons.NOBODY_ELSE


def _others(site: Found, seen: Pass, keys: Collection[Key]) -> set[str]:
    """The classes of the modules besides the site that keep any of `keys`."""
    return {seen.classes[keeper.removesuffix(_INVERTED)] for keeper in seen.stock.besides(site.path, keys)}
