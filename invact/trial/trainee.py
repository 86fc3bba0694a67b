"""One model that is trained in one way from one seed, step by step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from invact.bench.kept_bytes import counted
from invact.bench.timing import wait_for
from invact.errors.checks import Inputs
from invact.errors.own_errors import first_line, own_error
from invact.fitting.lifetimes import WEIGHT, Lifetimes
from invact.ledger.kept_storages import KeptStorages
from invact.ledger.storages import storage_sizes
from invact.pytorch.containers import tree_leaves, tree_map_only
from invact.simulation.setting import Setting
from invact.trial.task import Batch, NotTrainableError, Task
from invact.trial.ways import BASELINE, SELECTIVE, way_called

_FINAL_SEED = 1_000_000  # of the samples that all are asked for at the end
_FINAL_BATCHES = 16  # at the most, or as many as were trained on: chosen, so that they take little of a trial's time

Change = Callable[[nn.Module, Inputs], Callable[..., Any]]
"""Makes a model train in some way, in place, and gives what is called in its stead."""


class Training(Protocol):
    """What a trial asks for a step, be it a model in this process or one in others.

    Attributes:
        losses: by step.
        seconds: by step.
        activation_bytes: kept for backward at the first step.
        peak_bytes: of GPU memory; None without one.
        processes: how many share a batch.
        sent_bytes: as of `Run`.
        final_loss: of the trained model on the same samples for all; None before it has ended.
    """

    way: str
    losses: list[float]
    seconds: list[float]
    activation_bytes: int
    peak_bytes: int | None
    processes: int
    sent_bytes: tuple[int, int] | None
    final_loss: float | None

    def step(self, number: int) -> None:
        """Trains on one batch, and notes the loss, the time and, at the first, the bytes kept."""

    def end(self) -> None:
        """Notes the final loss and frees the memory."""


class Trainee:
    """A `Training` in this process.

    Args:
        learning_rate: of AdamW.
        change: what makes its model train in this way.
        share: of a batch, what this process trains on.
    """

    processes = 1
    sent_bytes: tuple[int, int] | None = None

    def __init__(
        self,
        way: str,
        task: Task,
        setting: Setting,
        seed: int,
        batch_size: int,
        learning_rate: float,
        change: Change,
        share: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self.way = way
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.activation_bytes = 0
        self.peak_bytes: int | None = None
        self.final_loss: float | None = None
        self._task, self._setting, self._seed, self._batch_size, self._share = task, setting, seed, batch_size, share
        torch.manual_seed(seed)
        self._model = task.build().to(setting.device)
        if not any(p.requires_grad for p in self._model.parameters()):
            raise NotTrainableError(f"{task.title} is not trainable: none of its parameters takes a gradient.")
        self._forward = change(self._model, self._batch(0).inputs)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate)
        self._scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.autocast is torch.float16)

    def step(self, number: int) -> None:
        """Trains on one batch, and notes the loss, the time and, at the first, the bytes kept."""
        batch = self._batch(number)
        torch.manual_seed(self._seed + number)
        with self._clock(), self._peak():
            self._optimizer.zero_grad()
            loss = self._counted_loss(batch) if number == 0 else self._loss(batch)
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        if not math.isfinite(loss.item()):
            raise NotTrainableError(
                f"{self._task.title} is not trainable like this: the loss of {self.way} is {loss.item()} at step "
                f"{number} of seed {self._seed}."
            )
        self.losses.append(loss.item())

    def end(self) -> None:
        """Notes the final loss and frees the memory; the batches of two seeds differ by more than their models do."""
        batches = [self._batch(number, _FINAL_SEED) for number in range(min(_FINAL_BATCHES, len(self.losses)))]
        torch.manual_seed(_FINAL_SEED)
        with torch.no_grad():
            self.final_loss = statistics.fmean(self._loss(batch).item() for batch in batches)
        del self._model, self._forward, self._optimizer

    def _batch(self, number: int, seed: int | None = None) -> Batch:
        batch = self._task.batch(self._seed if seed is None else seed, number, self._batch_size)
        return on_device(self._share(batch), self._setting.device)

    def _loss(self, batch: Batch) -> Tensor:
        autocast = self._setting.autocast
        with torch.autocast(self._setting.device.type, autocast, enabled=autocast is not None):
            return self._task.loss(self._forward, batch)

    def _counted_loss(self, batch: Batch) -> Tensor:
        if self.way == SELECTIVE:
            return self._loss_and_living_bytes(batch)
        try:
            compiled = way_called(self.way).compiled
            loss, self.activation_bytes = counted(self._model, lambda: self._loss(batch), compiled)
        except NotTrainableError:
            raise
        except Exception as error:
            why = own_error(lambda: self._loss(batch)) if self.way == BASELINE else None
            if why is None:
                raise
            raise NotTrainableError(f"{self._task.title} is not trainable like this: {first_line(why)}.") from error
        return loss

    def _loss_and_living_bytes(self, batch: Batch) -> Tensor:
        """Selective checkpointing keeps products in a dict of its own, which autograd's hooks do not see. So all that
        lives is counted, and of the batch, which was there before, what is kept."""
        given = [t for t in tree_leaves((batch.inputs, batch.targets)) if isinstance(t, Tensor)]
        there_before = {key for t in given for key in storage_sizes(t)}
        lifetimes = Lifetimes()
        for tensor in (*self._model.parameters(), *self._model.buffers(), *given):
            lifetimes.see(tensor, WEIGHT)
        with KeptStorages() as kept, lifetimes:
            loss = self._loss(batch)
        of_batch = sum(nbytes for key, nbytes in kept.sizes().items() if key in there_before)
        self.activation_bytes = lifetimes.alive_bytes() + of_batch
        return loss

    @contextmanager
    def _clock(self) -> Iterator[None]:
        wait_for(self._setting.device)
        start = time.perf_counter()
        yield
        wait_for(self._setting.device)
        self.seconds.append(time.perf_counter() - start)

    @contextmanager
    def _peak(self) -> Iterator[None]:
        """Of the memory allocated in the block and by this model before it; the other models' is left out."""
        if self._setting.device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self._resident_bytes()
        yield
        peak = torch.cuda.max_memory_allocated() - others
        self.peak_bytes = max(self.peak_bytes or 0, peak)

    def _resident_bytes(self) -> int:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        held = [*self._model.parameters(), *self._model.buffers(), *gradients, *states]
        sizes = {
            key: size for t in held if isinstance(t, Tensor) and t.is_cuda for key, size in storage_sizes(t).items()
        }
        return sum(sizes.values())


def on_device(batch: Batch, device: torch.device) -> Batch:
    inputs, targets = tree_map_only(Tensor, lambda t: t.to(device), (batch.inputs, batch.targets))
    return Batch(inputs, targets)
