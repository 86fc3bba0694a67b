"""Ways to take a training step: each changes a model, once and for good, and says what is called in its stead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from invact.errors.checks import Inputs
from invact.patchers.checkpointing import enable_checkpointing
from invact.patching import patch
from invact.report.report import Report


class Changed(NamedTuple):
    """A model that was changed.

    Attributes:
        forward: what is called to take a step.
        report: where invact did it.
    """

    forward: Callable[..., Any]
    report: Report | None = None


Way = Callable[[nn.Module, Inputs], Changed]
"""Given a model and its inputs."""


def stock(model: nn.Module, inputs: Inputs) -> Changed:
    """As the model is."""
    return Changed(model)


def patched(model: nn.Module, inputs: Inputs, exact: bool = False) -> Changed:
    """With `invact.patch`."""
    return Changed(model, patch(model, inputs, exact=exact))


def checkpointed(model: nn.Module, inputs: Inputs) -> Changed:
    """Every layer runs again in backward, by the library's own switch."""
    enable_checkpointing(model)
    return Changed(model)


def compiled(model: nn.Module, inputs: Inputs, by: str | Callable[..., Any] = "inductor") -> Changed:
    """By torch.compile, with the backend `by`."""
    return Changed(torch.compile(model, backend=by))


def patched_and_compiled(model: nn.Module, inputs: Inputs) -> Changed:
    """Both: patched, then compiled by inductor."""
    report = patched(model, inputs).report
    return Changed(compiled(model, inputs).forward, report)
