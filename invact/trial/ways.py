"""The ways of training that a trial compares: each changes a model, once and for good."""

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
from invact.patching import approximate_everywhere, fit, patch
from invact.trial.run import BASELINE, COMPRESSION, EXACT, FIT, INVACT, SELECTIVE
from invact.trial.selective import checkpoint_selectively
from invact.trial.task import NotTrainableError

WAYS = (BASELINE, INVACT, "checkpointing", "invact+checkpointing")
COMPILED_WAYS = ("compile", "invact+compile")
FEW_BITS = {f"fewbit-{bits}": bits for bits in (1, 2, 3, 4)}
ON_DEMAND = (EXACT, SELECTIVE, FIT, COMPRESSION, *FEW_BITS)


@dataclass(frozen=True)
class Options:
    """What holds for every way.

    Attributes:
        autocast: the dtype of torch.autocast, or None.
        exact: nothing is inverted wherever invact is at work.
        memory_bytes: of a GPU; "fit" needs it.
    """

    autocast: torch.dtype | None = None
    exact: bool = False
    memory_bytes: int | None = None


def change(way: str, model: nn.Module, inputs: Inputs, options: Options) -> Callable[..., Any]:
    """Makes the model train in one way, in place; what is returned is called in its stead.

    "compression" changes no model: it is what two processes do with it.

    Raises:
        ValueError: the way is none of `WAYS`, `COMPILED_WAYS` and `ON_DEMAND`, or can not be had for this model.
    """
    if "checkpointing" in way:
        enable_checkpointing(model)
    if way.startswith(INVACT) or way == EXACT:
        patch(model, inputs, autocast=options.autocast, exact=options.exact or way == EXACT)
    elif way == SELECTIVE:
        checkpoint_selectively(model)
    elif way == FIT:
        _fit(model, inputs, options)
    elif way in FEW_BITS:
        approximate_everywhere(model, inputs, few_bits=FEW_BITS[way], autocast=options.autocast)
    elif way not in (*WAYS, *COMPILED_WAYS, COMPRESSION):
        raise ValueError(f"There is no way of training called {way!r}. There are: {', '.join(_ALL)}.")
    return torch.compile(model) if "compile" in way else model


_ALL = (*WAYS, *COMPILED_WAYS, *ON_DEMAND)


def _fit(model: nn.Module, inputs: Inputs, options: Options) -> None:
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
