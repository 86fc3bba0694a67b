"""What a plan says: the sites, the bytes before and after, as an object, JSON and a table."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from invact.deriving.derived_tensor import DerivedTensor
from invact.report.amounts import format_bytes, in_words
from invact.report.tables import Column, print_table

INVERT = "invert"
DERIVE = "derive"
APPROXIMATE = "approximate"
KEEP = "keep"


@dataclass(frozen=True)
class Site:
    """One place in a model where a pointwise activation is computed.

    Attributes:
        path: dotted path of the module, by the first place where it is registered; for an expression in a method
            "path.method:curve".
        activation: the curve's name, such as "gelu_tanh".
        module_class: class name of the module found there, or the expression as written, such as "F.gelu(…)".
        action: "invert"; "derive", if the output is made again from what is kept; "approximate", if its derivative is
            one of a few values, which is done only with `few_bits`; or "keep".
        reason: why, in plain words.
        bytes_saved: fewer bytes kept for backward when this site is inverted or approximated; 0 if it is kept.
    """

    path: str
    activation: str
    module_class: str
    action: str
    reason: str
    bytes_saved: int = 0


@dataclass(frozen=True)
class FusedNorm:
    """A norm that the model writes out in steps and that one operator computes instead.

    Attributes:
        path: dotted path of the module.
        module_class: class name of the module found there.
        reason: why, and how both round, in plain words.
        bytes_moved_in_steps, bytes_moved: read and written, forward and backward, in steps and by the one operator.
    """

    path: str
    module_class: str
    reason: str
    bytes_moved_in_steps: int
    bytes_moved: int


@dataclass(frozen=True)
class CheckpointedBlock:
    """A block whose forward is run once more in backward, so that it keeps only what it is given.

    Attributes:
        path: dotted path of the module.
        bytes_won: fewer bytes kept between forward and backward.
        share: of what forward computes and moves, which is done twice.
    """

    path: str
    bytes_won: int
    share: float


@dataclass
class Report:
    """A plan for one model: what is done at every site, and what that saves.

    Attributes:
        sites: every site found, in the order of `model.named_modules()`.
        fused: the norms that are computed by one operator instead of in steps: on a GPU, and not with `exact`.
        derived: the tensors that are made again in backward instead of being kept, in the order of forward.
        bytes_before, bytes_after: what autograd keeps between forward and backward, without the model's
            parameters and buffers and without `weight_cast_bytes`.
        bytes_floor: what would remain if nothing were kept that operations without a matrix product can make again.
            Approximate sites, which keep less than any exact gradient needs, may bring `bytes_after` below it.
        remains: bytes after, by what made them, largest first: "matrix products", "attention", "residual sums".
        not_derived: of these, what could have been made again from less, by operator and why it was not.
        weight_cast_bytes: low-precision copies of weights that autocast keeps; the same before and after.
        loss_bytes_before, loss_bytes: of `bytes_before` and `bytes_after`, the logits of a model that computes its loss
            and whatever of them is kept for it; 0 without a loss.
        kept_by_class: bytes after, by the class of the module that keeps them, largest first.
        setting: what was planned for, in words.
        compiled: bytes that a compiled step keeps, counted as those above: with torch.compile's own backend under
            "default", with `backend="invact"` under "invact". Empty where nobody asked, or it could not be counted.
        peak_bytes_before, peak_bytes: predicted for a whole step with `optimizer`, one of many: weights, gradients,
            optimizer states, activations and temporary tensors; 0 where nobody asked.
        peak: what these bytes are for at the highest point after; `peak_at` says where that is.
        memory_bytes: the budget that was to be met; 0 if there was none.
        blocks: those that are checkpointed to meet it, in the order of forward.
        notes: what else the reader should know.
    """

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

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain dicts, lists, strings and numbers."""
        return {**asdict(self), "saving": self.saving, "checkpointed": self.checkpointed}

    def to_json(self) -> str:
        """`to_dict()` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def print(self, console: Console | None = None) -> None:
        """Prints sites and derived tensors, one row a kind, in any width, then the totals and who keeps the rest."""
        console = console or Console()
        if self.title:
            console.print(self.title, style="bold", highlight=False)
        if self.setting:
            console.print(self.setting, style="dim", highlight=False)
        if self.sites:
            self._print_sites(console)
        else:
            console.print("No pointwise activation was found in this model, as a module or in a method.")
        if self.fused:
            self._print_fused(console)
        if self.derived:
            self._print_derived(console)
        if self.blocks:
            self._print_blocks(console)
        console.print(self._totals(), highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False, markup=False)

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=120))
        return text.getvalue().rstrip()

    def _print_sites(self, console: Console) -> None:
        columns = [
            Column("sites", right=True),
            Column("example", least=16),
            Column("activation", least=10),
            Column("class", least=14),
            Column("action"),
            Column("reason", least=20),
            Column("saved", right=True),
        ]
        kinds = self._kinds()
        rows = [_row(kind) for kind in kinds]
        print_table(console, columns, rows, styles=["dim" if kind[0].action == KEEP else None for kind in kinds])

    def _print_fused(self, console: Console) -> None:
        columns = [
            Column("norms", right=True),
            Column("example", least=16),
            Column("class", least=14),
            Column("in one", least=20),
            Column("moved", right=True),
            Column("before", right=True),
        ]
        print_table(console, columns, [_fused_row(kind) for kind in self.fused_kinds()])

    def _print_blocks(self, console: Console) -> None:
        columns = [
            Column("blocks", right=True),
            Column("checkpointed", least=20),
            Column("won", right=True),
            Column("of a forward run twice", right=True),
        ]
        rows = [
            [
                str(len(alike)),
                alike[0].path + (f" to {alike[-1].path}" if len(alike) > 1 else ""),
                format_bytes(sum(block.bytes_won for block in alike)),
                f"{sum(block.share for block in alike):.1%}",
            ]
            for alike in self._blocks_alike()
        ]
        print_table(console, columns, rows)

    def _blocks_alike(self) -> list[list[CheckpointedBlock]]:
        """Neighbours that win about the same, together."""
        found: list[list[CheckpointedBlock]] = []
        for block in self.blocks:
            alike = found and abs(found[-1][0].bytes_won - block.bytes_won) <= 0.02 * block.bytes_won
            if alike and found[-1][0].path.rpartition(".")[0] == block.path.rpartition(".")[0]:
                found[-1].append(block)
            else:
                found.append([block])
        return found

    def in_one_line(self) -> str:
        """What was done and what it comes to, for a log."""
        done = [f"{len(self.inverted)} of {len(self.sites)} activations inverted"]
        done += [f"{len(self.approximate)} approximate"] if self.approximate else []
        done += [f"{len(self.derived)} tensors made again"] if self.derived else []
        done += [f"{len(self.fused)} norms fused"] if self.fused else []
        done += [f"{_counted(len(self.blocks), 'block')} checkpointed"] if self.blocks else []
        kept = f"{format_bytes(self.bytes_after)} instead of {format_bytes(self.bytes_before)} kept for backward"
        line = f"invact: {', '.join(done)}; {kept}, {self.saving:.1%} less"
        if self.peak_bytes:
            budget = f" of {format_bytes(self.memory_bytes)}" if self.memory_bytes else ""
            line += f"; predicted peak of a step {format_bytes(self.peak_bytes)}{budget}"
        return line

    def peak_in_words(self) -> list[str]:
        """The predicted peak before and after, where it is and what it is for, and what is left of the budget."""
        if not self.peak_bytes:
            return []
        lines = [
            f"Peak of a step with {self.optimizer}: {format_bytes(self.peak_bytes_before)} before, "
            f"{format_bytes(self.peak_bytes)} after, {self.peak_at}: {in_words(self.peak)}."
        ]
        if self.memory_bytes >= self.peak_bytes:
            left = format_bytes(self.memory_bytes - self.peak_bytes)
            how = f"{_counted(len(self.blocks), 'block')} checkpointed" if self.blocks else "nothing checkpointed"
            if self.peak_bytes_before <= self.memory_bytes:
                how += "; it fits as it is, too"
            lines.append(f"It fits {format_bytes(self.memory_bytes)} with {left} left, {how}.")
            if "on cuda" in self.setting:
                short = self.memory_bytes - self.peak_bytes < BEYOND_TENSORS
                lines.append(_MORE_THAN_IS_LEFT if short else _BEYOND_TENSORS)
        return lines

    def fused_kinds(self) -> list[list[FusedNorm]]:
        """The fused norms that a reader need not tell apart, together."""
        kinds: dict[tuple[str, str], list[FusedNorm]] = {}
        for norm in self.fused:
            kinds.setdefault((norm.module_class, norm.reason), []).append(norm)
        return list(kinds.values())

    def _print_derived(self, console: Console) -> None:
        columns = [
            Column("tensors", right=True),
            Column("not kept", least=14),
            Column("example", least=16),
            Column("wanted by", least=16),
            Column("instead", least=20),
            Column("saved", right=True),
            Column("moved", right=True),
        ]
        print_table(console, columns, [_derived_row(kind) for kind in self.derived_kinds()])

    def derived_kinds(self) -> list[list[DerivedTensor]]:
        """The derived tensors that are called the same, together, those first that save most."""
        kinds: dict[str, list[DerivedTensor]] = {}
        for tensor in self.derived:
            kinds.setdefault(tensor.what, []).append(tensor)
        return sorted(kinds.values(), key=lambda kind: -sum(tensor.bytes_saved for tensor in kind))

    def _kinds(self) -> list[list[Site]]:
        """The sites that a reader need not tell apart, together."""
        kinds: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            key = (site.action, site.activation, site.module_class, site.reason)
            kinds.setdefault(key, []).append(site)
        return sorted(kinds.values(), key=lambda kind: -sum(site.bytes_saved for site in kind))

    def _totals(self) -> str:
        lines = [
            f"Kept for backward: {format_bytes(self.bytes_before)} before, "
            f"{format_bytes(self.bytes_after)} after: {self.saving:.1%} saved."
        ]
        if self.derived:
            moved = format_bytes(sum(tensor.bytes_moved for tensor in self.derived))
            lines.append(
                f"{format_bytes(sum(tensor.bytes_saved for tensor in self.derived))} of that by making tensors again, "
                f"for which backward reads and writes {moved}."
            )
        if self.bytes_after and self.kept_by_class:
            largest = list(self.kept_by_class.items())[:6]
            shares = ", ".join(f"{name} {nbytes / self.bytes_after:.1%}" for name, nbytes in largest)
            lines.append(f"The rest is kept by: {shares}.")
        lines += self.distance_from_floor()
        if self.weight_cast_bytes:
            lines.append(
                f"Besides, autocast keeps {format_bytes(self.weight_cast_bytes)} of cast weights, whatever the batch."
            )
        if self.loss_bytes >= NOTICEABLE * self.bytes_after > 0:
            share = f"{self.loss_bytes / self.bytes_after:.1%}"
            lines.append(f"Of what is kept after, {format_bytes(self.loss_bytes)} are the loss's, {share}.")
        lines += self.peak_in_words()
        if self.compiled:
            lines.append(
                f"Compiled, {format_bytes(self.compiled['default'])} by default, "
                f'{format_bytes(self.compiled["invact"])} with backend="invact".'
            )
        return "\n".join(lines)

    def distance_from_floor(self) -> list[str]:
        """What would remain if all were derived that can be, what remains, and why it is more; in sentences."""
        if not self.bytes_floor or self.blocks:
            return []
        above = self.bytes_after / self.bytes_floor - 1
        lines = [
            f"The floor is {format_bytes(self.bytes_floor)}, what reading and writing memory alone can not make again: "
            + _from_floor(above, bool(self.approximate))
        ]
        shares = [
            f"{kind.removeprefix('other: ')} {nbytes / self.bytes_after:.1%}"
            for kind, nbytes in self.remains.items()
            if nbytes >= _WORTH_SAYING * self.bytes_after
        ]
        if shares:
            lines.append(f"What remains was made by: {', '.join(shares)}.")
        # Where the floor is far, all that keeps it there.
        worth = (_WORTH_SAYING if above <= _FAR else _WORTH_SAYING / 10) * self.bytes_after
        lines += [
            f"Kept though it could be made again: {format_bytes(nbytes)} by {name}."
            for name, nbytes in self.not_derived.items()
            if nbytes >= worth
        ]
        if above > _FAR and self.inverted:
            lines.append("Besides, an inverted activation keeps its output and mostly a bit per element.")
        return lines


def _from_floor(above: float, approximate: bool) -> str:
    if above >= 0.0005:
        return f"this plan is {above:.1%} above it."
    if approximate and above <= -0.0005:
        return f"this plan is {-above:.1%} below it, since some derivatives are approximate."
    return "this plan is there."


BEYOND_TENSORS = 1 << 29
"""Bytes of a GPU that CUDA's context and libraries take, about: 400 to 600 MiB on NVIDIA's cards of today."""

_MORE_THAN_IS_LEFT = (
    "CUDA's own context and libraries take half a GiB or so, which is more than is left: if the GPU has no more than "
    "this, ask for half a GiB less. PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is against fragments."
)

_BEYOND_TENSORS = (
    "Not counted are CUDA's own context and libraries, half a GiB or so; with "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True the allocator hardly reserves more than that."
)

NOTICEABLE = 0.05
"""The share of what is kept after from which on the loss's is told of."""

_FAR = 0.08
"""How far above the floor a plan is said to be far from it."""

_WORTH_SAYING = 0.005
"""The least share of what remains that is told of by itself."""


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit if number == 1 else unit + 's'}"


def _row(kind: list[Site]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.path or "(the model itself)",
        first.activation,
        first.module_class,
        first.action,
        first.reason,
        format_bytes(sum(site.bytes_saved for site in kind)) if first.action in (INVERT, APPROXIMATE) else "-",
    ]


def _fused_row(kind: list[FusedNorm]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.path or "(the model itself)",
        first.module_class,
        first.reason,
        format_bytes(sum(norm.bytes_moved for norm in kind)),
        format_bytes(sum(norm.bytes_moved_in_steps for norm in kind)),
    ]


def _derived_row(kind: list[DerivedTensor]) -> list[str]:
    first = kind[0]
    return [
        str(len(kind)),
        first.what,
        first.path or "(the model itself)",
        (first.kept_by or "(the model itself)") + (f" and {first.keepers - 1} more" if first.keepers > 1 else ""),
        first.reason,
        format_bytes(sum(tensor.bytes_saved for tensor in kind)),
        format_bytes(sum(tensor.bytes_moved for tensor in kind)),
    ]
