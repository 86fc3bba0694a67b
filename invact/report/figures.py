"""The figures of a plan, without any words: what tables, sentences and pages are made from."""

from __future__ import annotations

from dataclasses import dataclass, field

from invact.deriving.derived_tensor import DerivedTensor
from invact.report.records import APPROXIMATE, INVERT, CheckpointedBlock, FusedNorm, Site


@dataclass
class Figures:
    """What is done in a model and what it saves; `invact.report.report.Report` says what each of these is."""

    sites: list[Site]
    bytes_before: int = 0
    bytes_after: int = 0
    weight_cast_bytes: int = 0
    kept_by_class: dict[str, int] = field(default_factory=dict)
    setting: str = ""
    notes: list[str] = field(default_factory=list)
    title: str = ""
    derived: list[DerivedTensor] = field(default_factory=list)
    bytes_floor: int = 0
    remains: dict[str, int] = field(default_factory=dict)
    not_derived: dict[str, int] = field(default_factory=dict)
    compiled: dict[str, int] = field(default_factory=dict)
    fused: list[FusedNorm] = field(default_factory=list)
    loss_bytes_before: int = 0
    loss_bytes: int = 0
    optimizer: str = ""
    peak_bytes_before: int = 0
    peak_bytes: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    peak_at: str = ""
    memory_bytes: int = 0
    blocks: list[CheckpointedBlock] = field(default_factory=list)

    @property
    def saving(self) -> float:
        """Share of `bytes_before` that is saved, between 0 and 1."""
        return 1 - self.bytes_after / self.bytes_before if self.bytes_before else 0.0

    @property
    def inverted(self) -> list[Site]:
        """The sites whose action is "invert"."""
        return [site for site in self.sites if site.action == INVERT]

    @property
    def approximate(self) -> list[Site]:
        """The sites whose action is "approximate": their gradients are not the stock ones."""
        return [site for site in self.sites if site.action == APPROXIMATE]

    @property
    def checkpointed(self) -> list[str]:
        """The paths of the blocks that are checkpointed to meet a budget, in the order of forward."""
        return [block.path for block in self.blocks]

    def site_kinds(self) -> list[list[Site]]:
        """The sites that a reader need not tell apart, together."""
        kinds: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            key = (site.action, site.activation, site.module_class, site.reason)
            kinds.setdefault(key, []).append(site)
        return sorted(kinds.values(), key=lambda kind: -sum(site.bytes_saved for site in kind))

    def fused_kinds(self) -> list[list[FusedNorm]]:
        """The fused norms that a reader need not tell apart, together."""
        kinds: dict[tuple[str, str], list[FusedNorm]] = {}
        for norm in self.fused:
            kinds.setdefault((norm.module_class, norm.reason), []).append(norm)
        return list(kinds.values())

    def derived_kinds(self) -> list[list[DerivedTensor]]:
        """The derived tensors that are called the same, together, those first that save most."""
        kinds: dict[str, list[DerivedTensor]] = {}
        for tensor in self.derived:
            kinds.setdefault(tensor.what, []).append(tensor)
        return sorted(kinds.values(), key=lambda kind: -sum(tensor.bytes_saved for tensor in kind))

    def alike_blocks(self) -> list[list[CheckpointedBlock]]:
        """Neighbours that win about the same, together."""
        found: list[list[CheckpointedBlock]] = []
        for block in self.blocks:
            alike = found and abs(found[-1][0].bytes_won - block.bytes_won) <= 0.02 * block.bytes_won
            if alike and found[-1][0].path.rpartition(".")[0] == block.path.rpartition(".")[0]:
                found[-1].append(block)
            else:
                found.append([block])
        return found
