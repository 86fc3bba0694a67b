"""A model patched for the length of one training run, and the figures to log: what the callbacks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from invact.errors.checks import Inputs, check_exact, check_few_bits, check_patterns, holds_a_tensor
from invact.fitting.optimizers import as_counted
from invact.patching import fitted
from invact.report.amounts import format_bytes, memory_bytes
from invact.report.report import Report


class PatchedDuringTraining:
    """Patches on the first batch of a run and puts the model back after it.

    Attributes:
        report: the plan of the latest run, as `invact.fit` returns it; None before a run's first batch.
    """

    def __init__(
        self,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        exact: bool = False,
        few_bits: int | None = None,
        memory: str | int | None = None,
    ) -> None:
        check_patterns(include, exclude)
        check_exact(exact)
        check_few_bits(few_bits, exact)
        self.report: Report | None = None
        self._include = include
        self._exclude = exclude
        self._exact = exact
        self._few_bits = few_bits
        self._memory = None if memory is None else memory_bytes(memory)
        self._undo = ExitStack()
        self._unlogged: dict[str, float] = {}

    def _begin(self) -> None:
        """A new run; one that was begun and not ended is put back first."""
        self._put_back()
        self.report = None
        self._unlogged = {}

    def _patch(
        self,
        model: nn.Module,
        inputs: Inputs,
        autocast: torch.dtype | None,
        *,
        optimizer: Any,
        accumulating: bool,
        within: str = "",
    ) -> Report:
        """Patches until `_put_back`, and to fit the memory if there is a limit.

        Args:
            autocast: as of `invact.plan`.
            optimizer: of the Trainer, whose states and step are counted; None where it has none yet.
            accumulating: gradients are summed over several batches.
            within: a prefix that paths in the options and the report leave out.
        """
        if not holds_a_tensor(inputs):  # a batch of texts, say, that the model itself makes tensors of
            model, inputs, within = _Called(model, inputs), (), f"model.{within}"
        options: dict[str, Any] = {
            "autocast": autocast,
            "include": _prefixed(self._include, within),
            "exclude": _prefixed(self._exclude, within),
            "exact": self._exact,
            "few_bits": self._few_bits,
        }
        step = {"memory": self._memory, "optimizer": as_counted(optimizer), "accumulating": accumulating}
        report = self._undo.enter_context(fitted(model, inputs, **step, **options))
        self.report = replace(
            report,
            sites=[replace(site, path=_inside(site.path, within)) for site in report.sites],
            derived=[
                replace(tensor, path=_inside(tensor.path, within), kept_by=_inside(tensor.kept_by, within))
                for tensor in report.derived
            ],
            fused=[replace(norm, path=_inside(norm.path, within)) for norm in report.fused],
            blocks=[replace(block, path=_inside(block.path, within)) for block in report.blocks],
        )
        self._unlogged = plan_figures(self.report)
        return self.report

    def _put_back(self) -> None:
        self._undo.close()

    def _true_peak(self, device: torch.device) -> str | None:
        """The peak of a GPU beside the one that was predicted, for a log; None where there is none to tell."""
        figures = peak_figures(device)
        if self.report is None or not self.report.peak_bytes or not figures:
            return None
        true = int(figures["invact/peak_memory_bytes"])
        return f"invact: the peak was {format_bytes(true)}, predicted {format_bytes(self.report.peak_bytes)}"


class _Called(nn.Module):
    """A call of a model with these inputs, as a module that takes none."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self) -> Any:
        return self.model(**self._inputs) if isinstance(self._inputs, dict) else self.model(*self._inputs)


def _prefixed(patterns: str | Sequence[str] | None, prefix: str) -> list[str] | None:
    """The patterns as they match where the model stands inside others; what matches it as a whole matches those too.

    Example:
        >>> _prefixed("encoder.*", "module."), _prefixed("*", "module.")
        (['module.encoder.*'], ['module.*', '', 'module'])
    """
    if patterns is None:
        return None
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    whole = prefix and any(fnmatchcase("", pattern) for pattern in patterns)
    parts = prefix.split(".")[:-1]
    around = [".".join(parts[:count]) for count in range(len(parts) + 1)] if whole else []
    return [*(prefix + pattern for pattern in patterns), *around]


def _inside(path: str, within: str) -> str:
    """A path as it is inside the model, which is "" itself.

    Example:
        >>> _inside("module.encoder.0", "module."), _inside("module", "module.")
        ('encoder.0', '')
    """
    return "" if within.startswith(f"{path}.") else path.removeprefix(within)


def plan_figures(report: Report) -> dict[str, float]:
    """What a plan saves, as scalars under names that loggers group."""
    return {
        "invact/sites": len(report.inverted),
        "invact/bytes_before": report.bytes_before,
        "invact/bytes_after": report.bytes_after,
        "invact/bytes_saved": report.bytes_before - report.bytes_after,
        "invact/saving": report.saving,
        **({"invact/predicted_peak_bytes": report.peak_bytes} if report.peak_bytes else {}),
    }


def peak_figures(device: torch.device) -> dict[str, float]:
    """The peak of allocated bytes on a GPU so far; nothing on other devices, which do not count it."""
    if device.type != "cuda":
        return {}
    return {"invact/peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
