"""A model patched for the length of one training run, and the figures to log: what the callbacks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from invact.arguments import Inputs, check_exact, check_few_bits, check_patterns, holds_a_tensor
from invact.patching import patched
from invact.report import Report


class PatchedDuringTraining:
    """Patches on the first batch of a run and puts the model back after it.

    Attributes:
        report: the plan of the latest run, as `invact.patch` returns it; None before a run's first batch.
    """

    def __init__(
        self,
        *,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        exact: bool = False,
        few_bits: int | None = None,
    ) -> None:
        check_patterns(include, exclude)
        check_exact(exact)
        check_few_bits(few_bits, exact)
        self.report: Report | None = None
        self._include = include
        self._exclude = exclude
        self._exact = exact
        self._few_bits = few_bits
        self._undo = ExitStack()
        self._unlogged: dict[str, float] = {}

    def _begin(self) -> None:
        """A new run; one that was begun and not ended is put back first."""
        self._put_back()
        self.report = None
        self._unlogged = {}

    def _patch(self, model: nn.Module, inputs: Inputs, autocast: torch.dtype | None, *, within: str = "") -> Report:
        """Patches until `_put_back`; paths in the options and the report leave out the prefix `within`."""
        if not holds_a_tensor(inputs):  # a batch of texts, say, that the model itself makes tensors of
            model, inputs, within = _Called(model, inputs), (), f"model.{within}"
        during = patched(
            model,
            inputs,
            autocast=autocast,
            include=_prefixed(self._include, within),
            exclude=_prefixed(self._exclude, within),
            exact=self._exact,
            few_bits=self._few_bits,
        )
        report = self._undo.enter_context(during)
        self.report = replace(
            report,
            sites=[replace(site, path=site.path.removeprefix(within)) for site in report.sites],
            derived=[
                replace(tensor, path=tensor.path.removeprefix(within), kept_by=tensor.kept_by.removeprefix(within))
                for tensor in report.derived
            ],
            fused=[replace(norm, path=norm.path.removeprefix(within)) for norm in report.fused],
        )
        self._unlogged = plan_figures(self.report)
        return self.report

    def _put_back(self) -> None:
        self._undo.close()


class _Called(nn.Module):
    """A call of a model with these inputs, as a module that takes none."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._inputs = inputs

    def forward(self) -> Any:
        return self.model(**self._inputs) if isinstance(self._inputs, dict) else self.model(*self._inputs)


def _prefixed(patterns: str | Sequence[str] | None, prefix: str) -> list[str] | None:
    if patterns is None:
        return None
    return [prefix + pattern for pattern in ([patterns] if isinstance(patterns, str) else patterns)]


def plan_figures(report: Report) -> dict[str, float]:
    """What a plan saves, as scalars under names that loggers group."""
    return {
        "invact/sites": len(report.inverted),
        "invact/bytes_before": report.bytes_before,
        "invact/bytes_after": report.bytes_after,
        "invact/bytes_saved": report.bytes_before - report.bytes_after,
        "invact/saving": report.saving,
    }


def peak_figures(device: torch.device) -> dict[str, float]:
    """The peak of allocated bytes on a GPU so far; nothing on other devices, which do not count it."""
    if device.type != "cuda":
        return {}
    return {"invact/peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
