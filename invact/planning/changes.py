"""What is to be changed in a model, and applied to it: for good, for a while, or to count what is kept so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from invact.errors.checks import Inputs
from invact.planning.deciding import Decision
from invact.planning.places import Places
from invact.probing.probe import observe
from invact.probing.records import Observation
from invact.recognition.fused_rms_norm import Fusion
from invact.recognition.rewriting import Runner
from invact.recognition.written_expression import Written
from invact.report.records import INVERT, KEEP, FusedNorm
from invact.simulation.setting import Setting
from invact.swapping.approximation import Approximation
from invact.swapping.inversion import Inversion
from invact.swapping.planned_device import as_on
from invact.swapping.rewritten import in_an_expression
from invact.swapping.swaps import Swaps, swap_in


@dataclass(kw_only=True)
class Changes:
    """What is done at which module, by path.

    Attributes:
        setting: what was planned for.
        modules: how an activation is inverted or approximated.
        expressions: what runs in an expression's place, by the path of the module in whose methods it stands.
        derives: whether tensors are derived inside.
        norms: by which operator a norm is run.
        checkpointed: the paths of blocks.
    """

    setting: Setting
    modules: dict[str, Inversion | Approximation] = field(default_factory=dict)
    expressions: dict[str, dict[Written, Runner]] = field(default_factory=dict)
    derives: dict[str, bool] = field(default_factory=dict)
    norms: dict[str, Fusion] = field(default_factory=dict)
    checkpointed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.modules or self.expressions or self.derives or self.norms or self.checkpointed)

    def apply(self, model: nn.Module) -> Swaps:
        """Does all of it, or, after an error, nothing."""
        return swap_in(model, self.modules, self.expressions, self.derives, self.norms, self.checkpointed)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """`apply` for the length of a block."""
        swaps = self.apply(model)
        try:
            yield
        finally:
            swaps.undo()

    def observed(
        self, model: nn.Module, inputs: Inputs, *, record_operators: bool = False, record_derived: bool = False
    ) -> Observation:
        """A pass with all of it applied, as on the device that is planned for; what is recorded is as of `observe`."""
        with self.applied(model), as_on(self.setting.device):
            return observe(
                model, inputs, self.setting, record_operators=record_operators, record_derived=record_derived
            )


def changes_for(
    decisions: Sequence[Decision], found: Places, fused: Sequence[FusedNorm], setting: Setting, *, derives: bool
) -> Changes:
    """What makes these decisions true.

    Args:
        found: the places that a walk has found.
        fused: the norms that are to be run by one operator.
        derives: whether hooks are to be set; they cost time where nothing is derived.
    """
    changes = Changes(setting=setting, derives=found.derives if derives else {})
    for decision in decisions:
        site = decision.site
        if decision.action == KEEP:
            continue
        if site.written is None:
            changes.modules[site.path] = _how(decision)
        else:
            changes.expressions.setdefault(site.module_path, {})[site.written] = in_an_expression(_how(decision))
    fusions = {norm.path: norm.fusion for norm in found.norms}
    changes.norms.update({norm.path: fusions[norm.path] for norm in fused})
    return changes


def _how(decision: Decision) -> Inversion | Approximation:
    site = decision.site
    assert site.dependencies is not None
    if decision.action == INVERT:
        return Inversion(site.curve, site.dependencies, decision.in_place, decision.derivable)
    assert decision.bits is not None
    return Approximation(site.curve, site.dependencies, decision.bits, decision.in_place)
