"""Patch a model in place, for good or for a while, or until a step fits; and undo it.

Each decides (`invact.planning.plans.decide`: walk, probe, decide, report) and applies what was decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from invact.errors.checks import Inputs, check_model
from invact.fitting.choosing import fit_in
from invact.fitting.optimizers import NotSimulatedError, OptimizerLike, check_optimizer
from invact.patchers import example_inputs as make_inputs
from invact.planning.plans import decide
from invact.report.amounts import memory_bytes
from invact.report.report import Report
from invact.simulation.time_limit import TookTooLongError
from invact.swapping.swaps import Swaps, swaps_in


def patch(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    autocast: torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
) -> Report:
    """Inverts and derives, in place, whatever of `model` keeps fewer bytes then, and reports what was done.

    Takes the arguments and raises the errors of `invact.plan`. Either all that the report tells is done or, after an
    error, nothing. Every module stays the object that it is, with its attributes, parameters and hooks; those that are
    inverted, or inside which tensors are derived, get a class of their own, a subclass of the one they had. Results
    without gradients stay.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = patch(model, (torch.randn(8, 64),))
        >>> [site.path for site in report.inverted], isinstance(model[1], nn.GELU)
        (['1'], True)
    """
    return _patch(
        model, example_inputs, autocast=autocast, include=include, exclude=exclude, exact=exact, few_bits=few_bits
    )[0]


def fit(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    memory: str | int,
    optimizer: OptimizerLike = "adamw",
    autocast: torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
    accumulating: bool = False,
) -> Report:
    """`patch`, and where that does not do, gradient checkpointing of the fewest blocks with which a step fits.

    A whole step is simulated: forward with its loss, backward, the optimizer. Blocks are taken in the order of bytes
    won for time lost; `report.blocks` says which, `report.peak_bytes` what the step takes. `unpatch` takes it all back.

    Args:
        model, example_inputs, autocast, include, exclude, exact, few_bits: as of `invact.plan`; with the batch that is
            to fit, and labels among them where the model computes its loss.
        memory: for all of a step: as "24GiB", or a number of bytes.
        optimizer: one of "adamw", "adamw-fused", "adamw-8bit", "adafactor", "momentum", "sgd", "none", with states in
            the dtype of the parameters, as PyTorch's are; or the `torch.optim.Optimizer` that is to train.
        accumulating: gradients are summed over several batches, so that they are there in forward as well.

    Raises:
        DoesNotFitError: no choice of blocks does, or the model has none; a ValueError. The model is as it was.
        NotSimulatedError: the step does not run on simulated tensors; a ValueError.
        TypeError, ValueError, LeftoverError, TimeoutError: as of `invact.plan`; of `memory` and `optimizer`.

    Example:
        >>> def block():
        ...     return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> model = nn.Sequential(*(block() for _ in range(4)))
        >>> report = fit(model, (torch.randn(1024, 64),), memory="7MiB", optimizer="sgd", exact=True)
        >>> report.checkpointed, report.peak_bytes <= 7 * 2**20
        (['0'], True)
    """
    return _fit(
        model,
        example_inputs,
        memory=memory,
        optimizer=optimizer,
        autocast=autocast,
        include=include,
        exclude=exclude,
        exact=exact,
        few_bits=few_bits,
        accumulating=accumulating,
    )[0]


@contextmanager
def fitted(model: nn.Module, example_inputs: Inputs | None = None, **options: Any) -> Iterator[Report]:
    """`fit` for the length of a block, with the arguments of that.

    `memory` may be None, which checkpoints nothing; the peak is told then if it can be.
    """
    report, swaps = _fit(model, example_inputs, **options)
    try:
        yield report
    finally:
        swaps.undo()


def unpatch(model: nn.Module) -> int:
    """Gives every module that `patch` changed its class back, and returns the number of sites restored.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> report = patch(model, (torch.randn(8, 64),))
        >>> unpatch(model)
        1
    """
    return swaps_in(model).undo()


@contextmanager
def patched(
    model: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    autocast: torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact: bool = False,
    few_bits: int | None = None,
) -> Iterator[Report]:
    """`patch` for the length of a block; what was patched before the block stays so after it.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
        >>> with patched(model, (torch.randn(8, 64),)) as report:
        ...     loss = model(torch.randn(8, 64)).sum()
    """
    report, swaps = _patch(
        model, example_inputs, autocast=autocast, include=include, exclude=exclude, exact=exact, few_bits=few_bits
    )
    try:
        yield report
    finally:
        swaps.undo()


def _patch(model: nn.Module, example_inputs: Inputs | None, **options: Any) -> tuple[Report, Swaps]:
    decided = decide(model, example_inputs, **options)
    return decided.report, decided.apply(model)


def _fit(
    model: nn.Module,
    example_inputs: Inputs | None,
    *,
    memory: str | int | None,
    optimizer: OptimizerLike,
    accumulating: bool,
    **options: Any,
) -> tuple[Report, Swaps]:
    budget = None if memory is None else memory_bytes(memory)
    check_optimizer(optimizer)
    if example_inputs is None:
        check_model(model)
        example_inputs = make_inputs(model)
    decided = decide(model, example_inputs, **options)
    try:
        fit_in(decided, model, example_inputs, optimizer=optimizer, memory=budget, accumulating=accumulating)
    except (NotSimulatedError, TookTooLongError):
        if budget is not None:
            raise  # without one, only the peak is not told
    return decided.report, decided.apply(model)
