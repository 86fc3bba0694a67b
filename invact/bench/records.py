"""What was timed and counted: one pass of an activation, one step of a model, by contender."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from invact.bench.contenders import INVACT, STOCK
from invact.bench.timing import Race
from invact.report.amounts import format_bytes

COPY = "copy"


@dataclass
class KernelTimes:
    """One pass of one activation.

    Attributes:
        dtype: as "bfloat16".
        passed: "forward", "backward", "forward + backward"; or with ", host" what the call alone takes of the host.
        elements: of the tensor.
        kept_bytes: between forward and backward, by contender.
        kept_besides_output_bytes: the same without the output, which the next layer keeps in most models anyway.
        peak_bytes: of GPU memory in a forward and backward, x and dy not counted, by contender; empty without a GPU.
        moved_bytes: what the pass must read and write at least, by contender; empty for the host's passes.
    """

    curve: str
    dtype: str
    passed: str
    elements: int
    kept_bytes: dict[str, int]
    kept_besides_output_bytes: dict[str, int]
    peak_bytes: dict[str, int]
    moved_bytes: dict[str, int]
    race: Race = field(default_factory=Race)

    def of_copy(self, name: str) -> float | None:
        """The bandwidth reached, as a share of what a copy of as many bytes reaches; None where none took part."""
        if COPY not in self.race.seconds or name == COPY:
            return None
        # The copy moves what invact must; who must move more or less is measured by that.
        own_share = self.moved_bytes[name] / self.moved_bytes[INVACT]
        return own_share / self.race.ratio(name, COPY)

    def to_dict(self) -> dict[str, Any]:
        return {
            "curve": self.curve,
            "dtype": self.dtype,
            "pass": self.passed,
            "elements": self.elements,
            "rounds": self.race.rounds,
            "contenders": [
                _times(self.race, name)
                | {
                    "kept_bytes": self.kept_bytes.get(name),
                    "kept_besides_output_bytes": self.kept_besides_output_bytes.get(name),
                    "peak_bytes": self.peak_bytes.get(name),
                    "bytes_per_second": self.bytes_per_second(name),
                    "share_of_copy": self.of_copy(name),
                }
                for name in self.race.seconds
            ],
        }

    def bytes_per_second(self, name: str) -> float | None:
        moved = self.moved_bytes.get(INVACT if name == COPY else name)
        return None if moved is None else moved / self.race.median(name)


@dataclass
class StepTimes:
    """A training step of one model.

    Attributes:
        model: the name it was asked for by.
        inputs: in words.
        dtype: of the parameters, as "bfloat16".
        planned_bytes_before, planned_bytes_after: kept for backward, by the plan that "invact" was patched with.
        kept_bytes: the same, counted in a real step, by way.
        peak_bytes: of GPU memory in a step, what is there before it not counted, by way; empty without a GPU.
    """

    model: str
    model_class: str
    inputs: str
    dtype: str
    planned_bytes_before: int = 0
    planned_bytes_after: int = 0
    kept_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    race: Race = field(default_factory=Race)

    @property
    def planned_bytes_saved(self) -> int:
        return self.planned_bytes_before - self.planned_bytes_after

    @property
    def kept_bytes_saved(self) -> int:
        return self.kept_bytes[STOCK] - self.kept_bytes[INVACT]

    @property
    def peak_bytes_saved(self) -> int | None:
        return self.peak_bytes[STOCK] - self.peak_bytes[INVACT] if self.peak_bytes else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "model_class": self.model_class,
            "inputs": self.inputs,
            "dtype": self.dtype,
            "rounds": self.race.rounds,
            "planned_bytes_before": self.planned_bytes_before,
            "planned_bytes_after": self.planned_bytes_after,
            "planned_bytes_saved": self.planned_bytes_saved,
            "kept_bytes_saved": self.kept_bytes_saved,
            "peak_bytes_saved": self.peak_bytes_saved,
            "ways": [
                _times(self.race, way) | {"kept_bytes": self.kept_bytes[way], "peak_bytes": self.peak_bytes.get(way)}
                for way in self.race.seconds
            ],
        }

    def saved_in_words(self) -> str:
        """What was saved, beside what the plan had promised."""
        found = f"The plan saves {format_bytes(self.planned_bytes_saved)}; saved were "
        found += self._beside_plan(self.kept_bytes_saved, "kept for backward")
        if self.peak_bytes_saved is not None:
            found += f" and {self._beside_plan(self.peak_bytes_saved, 'at the peak')}"
        return f"{found}."

    def _beside_plan(self, saved: int, where: str) -> str:
        planned = self.planned_bytes_saved
        off = f", {saved / planned - 1:+.2%}" if planned else ""
        return f"{format_bytes(saved)} {where}{off}"


def _times(race: Race, name: str) -> dict[str, Any]:
    ratios = race.ratios(name)
    return {
        "name": name,
        "seconds": race.median(name),
        "ratio": race.ratio(name),
        "ratio_quartiles": list(race.quartiles(name)),
        "ratio_range": [min(ratios), max(ratios)],
        "seconds_by_round": race.seconds[name][: race.rounds],
    }
