"""The same training in several ways, step by step side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from invact.arguments import Inputs
from invact.checkpointing import can_checkpoint, enable_checkpointing
from invact.fitting_batch import needs
from invact.kept_storages import KeptStorages
from invact.layers import memory_by_layer
from invact.ledger import Ledger, storage_sizes
from invact.own_errors import first_line, own_error
from invact.patching import patch
from invact.planning import decide
from invact.pytorch_inside import tree_map_only
from invact.simulation import Setting
from invact.timing import wait_for
from invact.trial_data import DataError
from invact.trial_result import BASELINE, Run, Trial
from invact.trial_task import Batch, NotTrainableError, Task

WAYS = (BASELINE, "invact", "checkpointing", "invact+checkpointing")
COMPILED_WAYS = ("compile", "invact+compile")
_LEARNING_RATE = 5e-4


def train_in_ways(
    task: Task,
    *,
    steps: int,
    batch_size: int,
    seeds: Sequence[int] = (0,),
    ways: Sequence[str] = WAYS,
    setting: Setting | None = None,
    exact: bool = False,
    memory_bytes: int | None = None,
    on_step: Callable[[str], None] = lambda way: None,
    on_estimate: Callable[[float, int], None] = lambda seconds, steps: None,
) -> Trial:
    """Trains the task's model from the same seeds in every way, and compares.

    All ways take a step before any takes the next, in turns, so that a busy machine slows all of them alike.
    They see the same batches, start from the same weights and draw the same random numbers.

    Args:
        ways: of `WAYS` and `COMPILED_WAYS`; the baseline and "invact" among them.
        setting: the device, and the dtype of torch.autocast if any; fp16 is trained with scaled gradients.
        exact: nothing is inverted, activations are derived instead, and the gradients are bit for bit the stock ones.
        memory_bytes: of a GPU, to predict the largest batch for.
        on_step: called with the name of the way after every step.
        on_estimate: called once, when every way has taken its first two steps, with the seconds that the rest takes and
            its steps, those of all ways.

    Raises:
        DataError: there are fewer samples than a batch has.
        NotTrainableError: there is no loss, it is no finite number, or no parameter takes a gradient.
        KeyboardInterrupt: before every way had taken a step; later it ends the trial, which is returned.
    """
    setting = setting or Setting(torch.device("cpu"))
    if batch_size > task.samples:
        samples = "one sample" if task.samples == 1 else f"{task.samples} samples"
        raise DataError(
            f"A batch of {batch_size} is larger than the data: {task.title}, {samples}. "
            "Pass a smaller --batch-size, or more data."
        )
    if not can_checkpoint(task.build()):
        ways = [way for way in ways if "checkpointing" not in way]
    seeds_done: list[list[_Trainee]] = []
    interrupted = False
    try:
        for seed in seeds:
            start = time.perf_counter()
            trainees = [_Trainee(way, task, setting, seed, batch_size, exact) for way in ways]
            seeds_done.append(trainees)
            building = time.perf_counter() - start
            for step in range(steps):
                first = step % len(trainees)
                for trainee in trainees[first:] + trainees[:first]:
                    trainee.step(step)
                    on_step(trainee.way)
                if len(seeds_done) == 1 and step == min(1, steps - 1) and steps * len(seeds) > step + 1:
                    steps_left = (steps * len(seeds) - step - 1) * len(ways)
                    on_estimate(_seconds_left(trainees, building, steps, len(seeds)), steps_left)
            for trainee in trainees:
                trainee.drop_model()
    except KeyboardInterrupt:
        interrupted = True
        seeds_done = _complete_rounds(seeds_done)
        if not seeds_done:
            raise
    trial = _compared(task, setting, seeds_done, batch_size, exact, memory_bytes)
    trial.setting = _in_words(setting, steps, batch_size, len(seeds), exact)
    if interrupted:
        trial.interrupted = True
        taken = sum(len(trainees[0].losses) for trainees in seeds_done)
        trial.notes.append(f"interrupted after {taken} of {steps * len(seeds)} steps of each way.")
    return trial


class _Trainee:
    """One model that is trained in one way from one seed."""

    def __init__(self, way: str, task: Task, setting: Setting, seed: int, batch_size: int, exact: bool) -> None:
        self.way = way
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.activation_bytes = 0
        self.peak_bytes: int | None = None
        self._task, self._setting, self._seed, self._batch_size = task, setting, seed, batch_size
        torch.manual_seed(seed)
        self._model = task.build().to(setting.device)
        if not any(p.requires_grad for p in self._model.parameters()):
            raise NotTrainableError(f"{task.title} is not trainable: none of its parameters takes a gradient.")
        if "checkpointing" in way:
            enable_checkpointing(self._model)
        if way.startswith("invact"):
            patch(self._model, self._batch(0).inputs, autocast=setting.autocast, exact=exact)
        self._forward = torch.compile(self._model) if "compile" in way else self._model
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_LEARNING_RATE)
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

    def drop_model(self) -> None:
        """Frees the memory; the figures stay."""
        del self._model, self._forward, self._optimizer

    def _batch(self, number: int) -> Batch:
        return on_device(self._task.batch(self._seed, number, self._batch_size), self._setting.device)

    def _loss(self, batch: Batch) -> Tensor:
        autocast = self._setting.autocast
        with torch.autocast(self._setting.device.type, autocast, enabled=autocast is not None):
            return self._task.loss(self._forward, batch)

    def _counted_loss(self, batch: Batch) -> Tensor:
        if "compile" in self.way:
            with KeptStorages([*self._model.parameters(), *self._model.buffers()]) as storages:
                loss = self._loss(batch)
            self.activation_bytes = storages.nbytes()
            return loss
        try:
            with Ledger(self._model) as ledger:
                loss = self._loss(batch)
        except NotTrainableError:
            raise
        except Exception as error:
            why = own_error(lambda: self._loss(batch)) if self.way == BASELINE else None
            if why is None:
                raise
            raise NotTrainableError(f"{self._task.title} is not trainable like this: {first_line(why)}.") from error
        self.activation_bytes = ledger.memory().total_bytes
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


def _seconds_left(trainees: Sequence[_Trainee], building: float, steps: int, seeds: int) -> float:
    """After the first steps of the first seed. The first of all is slower, as it warms up and is counted."""
    first = sum(trainee.seconds[0] for trainee in trainees)
    later = sum(trainee.seconds[-1] for trainee in trainees)
    taken = len(trainees[0].seconds)
    return (steps - taken) * later + (seeds - 1) * (building + first + (steps - 1) * later)


# --- the comparison -----------------------------------------------------------------------------------


def _complete_rounds(seeds_done: list[list[_Trainee]]) -> list[list[_Trainee]]:
    """Without the steps that not every way has taken, and the seeds without any."""
    for trainees in seeds_done:
        complete = min(len(trainee.losses) for trainee in trainees)
        for trainee in trainees:
            del trainee.losses[complete:], trainee.seconds[complete:]
    return [trainees for trainees in seeds_done if trainees[0].losses]


def _compared(
    task: Task,
    setting: Setting,
    seeds_done: list[list[_Trainee]],
    batch_size: int,
    exact: bool,
    memory_bytes: int | None,
) -> Trial:
    by_way = [list(trainees) for trainees in zip(*seeds_done, strict=True)]
    runs = [_run(trainees, baselines=by_way[0]) for trainees in by_way]
    model = task.build().to(setting.device)

    def inputs_of(size: int) -> Inputs:
        return on_device(task.batch(0, 0, size), setting.device).inputs

    inputs = inputs_of(batch_size)
    decided = decide(model, inputs, autocast=setting.autocast, exact=exact)
    if memory_bytes is not None:
        predicted = needs(model, inputs_of, setting, decided)
        for run in runs:
            if run.name in predicted:
                run.largest_batch = predicted[run.name].largest_batch(memory_bytes)
    return Trial(
        title=task.title,
        setting="",
        runs=runs,
        spread=_largest_difference(runs[0].losses_by_seed) if len(seeds_done) > 1 else None,
        report=decided.report,
        layers=memory_by_layer(model, inputs, setting, decided),
        memory_bytes=memory_bytes,
        notes=[] if can_checkpoint(model) else ["this model can not be checkpointed, so it was trained without."],
    )


def _run(trainees: list[_Trainee], baselines: list[_Trainee]) -> Run:
    """Of one way, all seeds."""
    first = trainees[0]
    peaks = [trainee.peak_bytes for trainee in trainees if trainee.peak_bytes is not None]
    seconds = [time for trainee in trainees for time in trainee.seconds[1:] or trainee.seconds]
    pairs = zip(trainees, baselines, strict=True)
    return Run(
        name=first.way,
        activation_bytes=first.activation_bytes,
        peak_bytes=max(peaks, default=None),
        seconds_per_step=statistics.median(seconds),
        losses=first.losses,
        losses_by_seed=[trainee.losses for trainee in trainees],
        largest_difference=max(_largest_difference([trainee.losses, baseline.losses]) for trainee, baseline in pairs),
    )


def _largest_difference(curves: Sequence[Sequence[float]]) -> float:
    """Between the curves at the same step."""
    by_step: list[tuple[float, ...]] = list(zip(*curves, strict=False))
    return max(max(losses) - min(losses) for losses in by_step)


def _in_words(setting: Setting, steps: int, batch_size: int, seeds: int, exact: bool) -> str:
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "CPU"
    precision = "fp32" if setting.autocast is None else f"autocast to {str(setting.autocast).removeprefix('torch.')}"
    words = [f"{steps} steps of {batch_size} samples", f"{seeds} {'seed' if seeds == 1 else 'seeds'}", precision]
    if exact:
        words.append("exact")
    return ", ".join([*words, device])
