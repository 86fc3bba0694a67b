"""Where something may be done in a model, as far as that can be told without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from invact.deriving.hooked_modules import places
from invact.planning.options import Options
from invact.planning.walking import unpatched_modules, walk
from invact.pytorch.one_thread import in_one_thread
from invact.pytorch.operators import has_fused_rms_norm
from invact.recognition.found_site import Found
from invact.recognition.norms_in_steps import FoundNorm, walk_norms
from invact.report import reasons
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


def _already_patched(path: str, module: nn.Module) -> Iterator[Site]:
    label, sites = inverted_in(module)
    for method, curve, bits in sites:
        place = ".".join(part for part in (path, method and method + ":" + curve) if part)
        yield Site(place, curve, label, KEEP, reasons.ALREADY_APPROXIMATE if bits else reasons.ALREADY_INVERTED)
