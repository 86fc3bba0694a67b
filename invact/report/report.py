"""What a plan says: the sites, the bytes before and after, as an object, JSON and a table."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from invact.report import sentences
from invact.report.figures import Figures
from invact.report.plan_tables import print_tables


@dataclass
class Report(Figures):
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
        print_tables(self, console)
        console.print(sentences.totals(self), highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False, markup=False)

    def in_one_line(self) -> str:
        """What was done and what it comes to, for a log."""
        return sentences.in_one_line(self)

    def peak_in_words(self) -> list[str]:
        """The predicted peak before and after, where it is and what it is for, and what is left of the budget."""
        return sentences.peak_in_words(self)

    def distance_from_floor(self) -> list[str]:
        """What would remain if all were derived that can be, what remains, and why it is more; in sentences."""
        return sentences.distance_from_floor(self)

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=120))
        return text.getvalue().rstrip()
