"""Takes training steps with a copy of a model, in one way: how long they take, and the memory at their peak."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from invact.bench.timing import wait_for, wall_seconds
from invact.bench.ways import Way, stock
from invact.errors.checks import Inputs
from invact.pytorch.containers import tree_leaves


class Stepper:
    """A copy of a model that takes its steps in one way: forward, loss and backward.

    Args:
        way: changes the copy; see `invact.bench.ways`.

    Attributes:
        report: where invact changed it.
        peak_bytes: on a GPU, of the last step: the most that was allocated beyond what was before it.

    Example:
        >>> stepper = Stepper(nn.Linear(4, 4), (torch.ones(2, 4),))
        >>> stepper.seconds() > 0
        True
    """

    def __init__(self, model: nn.Module, inputs: Inputs, way: Way = stock) -> None:
        self.model, self.inputs = copy.deepcopy(model), inputs
        self.device = next(model.parameters()).device
        self.forward, self.report = way(self.model, inputs)
        self.peak_bytes = 0
        self.allocated = 0  # on a GPU, before a step

    def seconds(self) -> float:
        """Of one step."""
        seconds = wall_seconds(lambda _: self.loss().backward(), self.prepare, self.device)
        if self.device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device) - self.allocated
        self.model.zero_grad()
        return seconds

    def loss(self) -> Tensor:
        """Of one forward."""
        return loss_of(called(self.forward, self.inputs))

    def prepare(self) -> None:
        """What goes before a step: the random numbers are the same for all, and on a GPU the peak begins anew."""
        torch.manual_seed(0)
        if self.device.type == "cuda":
            wait_for(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.allocated = torch.cuda.memory_allocated(self.device)


def loss_of(output: Any) -> Tensor:
    """The model's own loss, or the mean square of whatever it gives."""
    own: Tensor | None = getattr(output, "loss", None)
    if own is not None:
        return own
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().square().mean() for t in outputs]).sum()


def called(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What a model gives for its inputs, by keyword or by position."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)
