"""The peak of a training step in one way of a trial, predicted for the trial's own batch: the step is simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from invact.fitting.optimizers import NotSimulatedError
from invact.fitting.simulated_training import simulated_training
from invact.simulation.setting import Setting
from invact.trial.changing import WayOptions, change
from invact.trial.task import Batch, Task
from invact.trial.trainee import on_device
from invact.trial.ways import COMPRESSION, way_called
from invact.trial.worker import PROCESSES

OPTIMIZER = "adamw"  # what a trial trains with


def predicted_peak(way: str, task: Task, setting: Setting, batch_size: int, options: WayOptions) -> int | None:
    """Bytes at the highest point of one step of many, with the task's loss, weights and the states of AdamW.

    Of gradient compression it is one process with its share of the batch, and the buckets in which gradients are sent,
    which are there all the time and as large as the gradients.

    Returns None where the step can not be simulated, as under torch.compile.

    Args:
        way: one that can be had for the task's model.
        batch_size: of all processes together.
    """
    if way_called(way).compiled:
        return None
    processes = PROCESSES if way == COMPRESSION else 1
    model = task.build().to(setting.device)
    batch = on_device(task.batch(0, 0, batch_size // processes), setting.device)
    forward = change(way, model, batch.inputs, options)
    try:
        with simulated_training(_WithLoss(model, forward, task), _given(batch), setting, OPTIMIZER) as take_step:
            peak = take_step().peak_bytes
    except (NotSimulatedError, TimeoutError):
        return None
    return peak if processes == 1 else peak + sum(p.nbytes for p in model.parameters() if p.requires_grad)


class _WithLoss(nn.Module):
    """A model that gives the loss of its task."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any], task: Task) -> None:
        super().__init__()
        self.model = model
        self._forward, self._loss = forward, task.loss

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        return self._loss(self._forward, Batch(inputs, targets))


def _given(batch: Batch) -> tuple[Any, ...]:
    return (batch.inputs,) if batch.targets is None else (batch.inputs, batch.targets)
