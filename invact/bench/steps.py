"""Whole training steps timed: forward, loss and backward of real models, in several ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from invact import patchers
from invact.bench.contenders import CHECKPOINTING, COMPILE, INVACT, STOCK
from invact.bench.kept_bytes import counted
from invact.bench.random_models import with_weights
from invact.bench.records import StepTimes
from invact.bench.result import Bench
from invact.bench.stepper import Stepper, called, loss_of
from invact.bench.ways import Way, checkpointed, compiled, patched, patched_and_compiled, stock
from invact.errors.checks import Inputs
from invact.errors.own_errors import first_line, own_error
from invact.patchers.checkpointing import can_checkpoint
from invact.pytorch.containers import tree_leaves
from invact.report.inputs import size_in_words

# By the type of the device, or the longest sequence that the model takes where that is shorter.
DEFAULT_TOKENS = {"cpu": 128, "cuda": 512}

_COMPILED_WAYS: dict[str, Way] = {COMPILE: compiled, f"{INVACT}+{COMPILE}": patched_and_compiled}


class StepError(ValueError):
    """A step that the stock model can not take itself."""


def time_steps(
    bench: Bench,
    names: Sequence[str],
    dtypes: Sequence[torch.dtype],
    *,
    batch_size: int,
    seq_len: int | None,
    image_size: int | None,
    rounds: int,
    against: Sequence[str],
    device: torch.device,
    on_turn: Callable[[str], None] = lambda what: None,
) -> None:
    """Adds the times of every model in every dtype to `bench`, as far as it comes.

    Args:
        names: models, as `patchers.load` takes them.
        dtypes: of the parameters.
        seq_len, image_size: for those models that read text, or images.
        against: names of `invact.bench.contenders.NAMES`, of which checkpointing and compile are ways to take a step.

    Raises:
        patchers.ModelNameError, patchers.MissingLibraryError, patchers.InputSizeError: as of `patchers.load`.
        StepError: the stock model does not run like this.
    """
    for name in names:
        own = with_weights(name, image_size)
        for dtype in dtypes:
            model = copy.deepcopy(own).to(device, dtype)
            inputs = training_inputs(model, batch_size, seq_len, image_size, device)
            _time_step(bench, name, model, inputs, _ways(bench, name, model, against), rounds, on_turn)


def training_inputs(
    model: nn.Module, batch_size: int, seq_len: int | None, image_size: int | None, device: torch.device
) -> Inputs:
    """Made-up inputs on the device, with labels where the model computes its loss itself."""
    read = [x for x in tree_leaves(patchers.example_inputs(model, loss=False)) if isinstance(x, Tensor)]
    if any(x.is_floating_point() for x in read):
        seq_len = None
    else:
        image_size = None
        seq_len = seq_len or min(DEFAULT_TOKENS[device.type], read[0].shape[1])
    return patchers.example_inputs(model, batch_size, seq_len, image_size, device)


def _ways(bench: Bench, name: str, model: nn.Module, against: Sequence[str]) -> dict[str, Way]:
    """By name, stock first."""
    ways: dict[str, Way] = {STOCK: stock, INVACT: patched}
    if CHECKPOINTING in against and can_checkpoint(model):
        ways[CHECKPOINTING] = checkpointed
    elif CHECKPOINTING in against:
        bench.leave_out(f"{CHECKPOINTING} of {name}", "the model has no switch for it")
    return ways | _COMPILED_WAYS if COMPILE in against else ways


def _time_step(
    bench: Bench,
    name: str,
    model: nn.Module,
    inputs: Inputs,
    ways: Mapping[str, Way],
    rounds: int,
    on_turn: Callable[[str], None],
) -> None:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    times = StepTimes(name, type(model).__name__, size_in_words(inputs), dtype)
    steppers: dict[str, Stepper] = {}
    for way, change in ways.items():
        on_turn(f"{name} {dtype}: {way}, warming up")
        try:
            stepper = Stepper(model, inputs, change)
            times.kept_bytes[way] = _kept_in_first_step(stepper, compiled=way in _COMPILED_WAYS)
            steppers[way] = stepper
        except Exception as error:
            if way == STOCK:
                why = own_error(lambda: loss_of(called(model, inputs)).backward())
                if why is not None:
                    raise _step_error(name, dtype, times.inputs, why) from error
            if way in (STOCK, INVACT):
                raise
            bench.leave_out(f"{way} of {name}", error)
    report = steppers[INVACT].report
    assert report is not None
    times.planned_bytes_before, times.planned_bytes_after = report.bytes_before, report.bytes_after
    bench.steps.append(times)
    turns = {way: stepper.seconds for way, stepper in steppers.items()}
    times.race.run(turns, rounds, lambda way: on_turn(f"{name} {dtype}: {way}"))
    times.peak_bytes = {way: stepper.peak_bytes for way, stepper in steppers.items() if stepper.peak_bytes}


def _kept_in_first_step(stepper: Stepper, compiled: bool) -> int:
    """Bytes; the step warms up as well."""
    torch.manual_seed(0)
    loss, nbytes = counted(stepper.model, stepper.loss, compiled)
    loss.backward()
    stepper.model.zero_grad()
    if compiled:
        stepper.seconds()  # without the hooks that count, PyTorch compiles once more
    return nbytes


def _step_error(name: str, dtype: str, inputs: str, why: Exception) -> StepError:
    return StepError(
        f"A step of {name} in {dtype} on {inputs} does not run, not even the stock one: {first_line(why)}. "
        "Pass another --batch-size, --seq-len, --image-size or --dtype."
    )
