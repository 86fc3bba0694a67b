"""Chooses the norms that are run by one operator instead of in steps: those for which less memory is moved then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from invact.probing.records import Call
from invact.recognition.norm_costs import accesses_in_steps, own_rounding_of
from invact.recognition.norms_in_steps import FoundNorm
from invact.report.records import FusedNorm
from invact.simulation.setting import Setting


def fused_norms(
    found: Sequence[FoundNorm], calls: Mapping[str, Sequence[Call]], allowed: set[str], setting: Setting
) -> list[FusedNorm]:
    """The norms that are to be fused, in the model's order, with why and what is moved for them.

    Args:
        found: the norms that the model writes out in steps.
        calls: how each was called in a forward pass, by path.
        allowed: the paths that `include` and `exclude` leave.
    """
    costs: dict[tuple[object, torch.dtype], tuple[float, str]] = {}
    chosen = []
    for norm in found:
        if norm.path not in allowed or norm.replaced or not _can_be_fused(norm, calls.get(norm.path, []), setting):
            continue
        dtype = calls[norm.path][0].dtype
        key = (norm.fusion, dtype)
        if key not in costs:
            costs[key] = accesses_in_steps(norm, dtype), _rounding_in_words(norm, dtype)
        in_steps, rounding = costs[key]
        fused = norm.fusion.norm.accesses(dtype)
        if fused < in_steps:
            elements = sum(call.y_nbytes // call.dtype.itemsize for call in calls[norm.path])
            reason = f"its steps read and write {in_steps:.0f} bytes for an element, one operator {fused}{rounding}"
            chosen.append(FusedNorm(norm.path, norm.label, reason, int(elements * in_steps), elements * fused))
    return chosen


def _can_be_fused(norm: FoundNorm, calls: Sequence[Call], setting: Setting) -> bool:
    """Whether the fused operator may take the place of the steps in every call, as far as one pass tells.

    It keeps its input, of which steps in 16 bits keep a copy: it must not be changed in place.
    """
    dtype = norm.computes.get_parameter(norm.fusion.norm.weight).dtype
    under_autocast = setting.autocast is not None and dtype.itemsize == 2
    return (
        bool(calls)
        and not under_autocast
        and all(call.simple and call.needs_grad and call.input_contiguous and call.dtype is dtype for call in calls)
        and not any(call.input_changed_later or call.in_place or call.elsewhere for call in calls)
    )


def _rounding_in_words(norm: FoundNorm, dtype: torch.dtype) -> str:
    if dtype.itemsize > 2:
        return "; it adds up in another order"
    rounding = own_rounding_of(norm, dtype)
    return (
        f"; in {str(dtype).removeprefix('torch.')} they are {rounding.own:.1e} off float64, rounded once as here "
        f"{rounding.once:.1e}"
    )
