"""A model made to train in one way of a trial, in place, once and for good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from invact.errors.checks import Inputs
from invact.fitting.choosing import DoesNotFitError
from invact.fitting.optimizers import NotSimulatedError
from invact.patchers.checkpointing import enable_checkpointing
from invact.patching import fit, patch
from invact.trial.fewbit import approximate_everywhere
from invact.trial.selective import checkpoint_selectively
from invact.trial.task import NotTrainableError
from invact.trial.ways import way_called


@dataclass(frozen=True)
class WayOptions:
    """What holds for every way.

    Attributes:
        autocast: the dtype of torch.autocast, or None.
        exact: nothing is inverted wherever invact is at work.
        memory_bytes: of a GPU; "fit" needs it.
    """

    autocast: torch.dtype | None = None
    exact: bool = False
    memory_bytes: int | None = None


def change(way: str, model: nn.Module, inputs: Inputs, options: WayOptions) -> Callable[..., Any]:
    """Makes the model train in one way, in place; what is returned is called in its stead.

    "compression" changes no model: it is what two processes do with it.

    Raises:
        ValueError: there is no such way in `invact.trial.ways`, or it can not be had for this model.
    """
    asked = way_called(way)
    if asked.checkpointed:
        enable_checkpointing(model)
    if asked.patched:
        patch(model, inputs, autocast=options.autocast, exact=options.exact or asked.exact)
    if asked.selective:
        checkpoint_selectively(model)
    if asked.fits:
        _fit(model, inputs, options)
    if asked.few_bits is not None:
        approximate_everywhere(model, inputs, few_bits=asked.few_bits, autocast=options.autocast)
    return torch.compile(model) if asked.compiled else model


def _fit(model: nn.Module, inputs: Inputs, options: WayOptions) -> None:
    if options.memory_bytes is None:
        raise ValueError("The way fit is to fit a memory, and none was named. Name it: --gpu-memory 24GiB.")
    try:
        fit(
            model,
            inputs,
            memory=options.memory_bytes,
            optimizer="adamw",
            autocast=options.autocast,
            exact=options.exact,
        )
    except (DoesNotFitError, NotSimulatedError) as error:
        raise NotTrainableError(str(error)) from error
