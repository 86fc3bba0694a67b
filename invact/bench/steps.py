"""Whole training steps timed: forward, loss and backward of real models, in several ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invact import patchers
from invact.bench.contenders import CHECKPOINTING, COMPILE, INVACT, STOCK
from invact.bench.real_models import with_weights
from invact.bench.result import Bench, StepTimes
from invact.bench.timing import wait_for, wall_seconds
from invact.errors.checks import Inputs
from invact.errors.own_errors import first_line, own_error
from invact.ledger.kept_storages import KeptStorages
from invact.ledger.ledger import Ledger
from invact.patchers.checkpointing import can_checkpoint, enable_checkpointing
from invact.patching import patch
from invact.pytorch.containers import tree_leaves
from invact.report.inputs import size_in_words

# By the type of the device, or the longest sequence that the model takes where that is shorter.
DEFAULT_TOKENS = {"cpu": 128, "cuda": 512}


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


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or the mean square of whatever it gives."""
    own: Tensor | None = getattr(output, "loss", None)
    if own is not None:
        return own
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().square().mean() for t in outputs]).sum()


def _ways(bench: Bench, name: str, model: nn.Module, against: Sequence[str]) -> list[str]:
    ways = [STOCK, INVACT]
    if CHECKPOINTING in against and can_checkpoint(model):
        ways.append(CHECKPOINTING)
    elif CHECKPOINTING in against:
        bench.leave_out(f"{CHECKPOINTING} of {name}", "the model has no switch for it")
    return [*ways, COMPILE, f"{INVACT}+{COMPILE}"] if COMPILE in against else ways


def _time_step(
    bench: Bench,
    name: str,
    model: nn.Module,
    inputs: Inputs,
    ways: Sequence[str],
    rounds: int,
    on_turn: Callable[[str], None],
) -> None:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    times = StepTimes(name, type(model).__name__, size_in_words(inputs), dtype)
    steppers: dict[str, _Stepper] = {}
    for way in ways:
        on_turn(f"{name} {dtype}: {way}, warming up")
        try:
            steppers[way] = _Stepper(way, model, inputs)
        except Exception as error:
            if way == STOCK:
                why = own_error(lambda: loss_of(_called(model, inputs)).backward())
                if why is not None:
                    raise _step_error(name, dtype, times.inputs, why) from error
            if way in (STOCK, INVACT):
                raise
            bench.leave_out(f"{way} of {name}", error)
    patched = steppers[INVACT].report
    assert patched is not None
    times.planned_bytes_before, times.planned_bytes_after = patched.bytes_before, patched.bytes_after
    times.kept_bytes = {way: stepper.kept_bytes for way, stepper in steppers.items()}
    bench.steps.append(times)
    turns = {way: stepper.turn for way, stepper in steppers.items()}
    times.race.run(turns, rounds, lambda way: on_turn(f"{name} {dtype}: {way}"))
    times.peak_bytes = {way: stepper.peak_bytes for way, stepper in steppers.items() if stepper.peak_bytes}


class _Stepper:
    """A copy of a model that takes its steps in one way; made, it has taken one and counted what that kept."""

    def __init__(self, way: str, model: nn.Module, inputs: Inputs) -> None:
        self.peak_bytes = 0
        self.report = None
        self._allocated = 0  # before a step
        self._inputs = inputs
        self._model = copy.deepcopy(model)
        self._device = next(model.parameters()).device
        if way == CHECKPOINTING:
            enable_checkpointing(self._model)
        if way.startswith(INVACT):
            self.report = patch(self._model, inputs)
        self._forward = torch.compile(self._model) if way.endswith(COMPILE) else self._model
        compiled = way.endswith(COMPILE)
        self.kept_bytes = self._counted(compiled)
        if compiled:
            self._step()  # without the hooks that count, PyTorch compiles once more

    def turn(self) -> float:
        """One step, in seconds."""
        return wall_seconds(lambda _: self._step(), self._before, self._device)

    def _before(self) -> None:
        torch.manual_seed(0)
        if self._device.type == "cuda":
            wait_for(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._allocated = torch.cuda.memory_allocated(self._device)

    def _step(self) -> None:
        self._loss().backward()
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self._device) - self._allocated
        self._model.zero_grad()

    def _loss(self) -> Tensor:
        return loss_of(_called(self._forward, self._inputs))

    def _counted(self, compiled: bool) -> int:
        torch.manual_seed(0)
        if compiled:
            with KeptStorages([*self._model.parameters(), *self._model.buffers()]) as kept:
                loss = self._loss()
            nbytes = kept.nbytes()
            del kept
        else:
            with Ledger(self._model) as ledger:
                loss = self._loss()
            nbytes = ledger.memory().total_bytes
        loss.backward()
        self._model.zero_grad()
        return nbytes


def _called(model: Callable[..., Any], inputs: Inputs) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _step_error(name: str, dtype: str, inputs: str, why: Exception) -> StepError:
    return StepError(
        f"A step of {name} in {dtype} on {inputs} does not run, not even the stock one: {first_line(why)}. "
        "Pass another --batch-size, --seq-len, --image-size or --dtype."
    )
