"""The same training in several ways, step by step side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from invact.errors.checks import Inputs
from invact.fitting.batches import needs
from invact.fitting.blocks import repeated_blocks
from invact.patchers.checkpointing import can_checkpoint
from invact.planning.by_layer import memory_by_layer
from invact.planning.plans import decide
from invact.report.amounts import format_bytes
from invact.simulation.setting import Setting
from invact.trial.changing import WayOptions, change
from invact.trial.data import DataError
from invact.trial.peak import predicted_peak
from invact.trial.processes import CompressedTraining, Pair
from invact.trial.result import Trial
from invact.trial.task import Task
from invact.trial.trainee import Trainee, Training, on_device
from invact.trial.verdict import Yardsticks
from invact.trial.way_result import Run
from invact.trial.ways import COMPRESSION, EXACT, INVACT, SELECTIVE, WAYS, way_called


def train_in_ways(
    task: Task,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 5e-4,
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
        learning_rate: of AdamW.
        ways: of `WAYS`, `COMPILED_WAYS` and `ON_DEMAND`; the baseline first, and "invact" among them.
        setting: the device, and the dtype of torch.autocast if any; fp16 is trained with scaled gradients.
        exact: nothing is inverted, activations are derived instead, and the gradients are bit for bit the stock ones.
        memory_bytes: of a GPU, to predict the largest batch for; "fit" is made to fit it.
        on_step: called with the name of the way after every step.
        on_estimate: called once, when every way has taken its first two steps, with the seconds that the rest takes and
            its steps, those of all ways.

    Raises:
        DataError: there are fewer samples than a batch has; for gradient compression, a batch can not be halved.
        NotTrainableError: there is no loss, it is no finite number, or no parameter takes a gradient; a way can not be
            had, such as "fit" where nothing fits.
        ProcessError: a process of gradient compression failed.
        KeyboardInterrupt: before every way had taken a step; later it ends the trial, which is returned.
    """
    setting = setting or Setting(torch.device("cpu"))
    if batch_size > task.samples:
        samples = "one sample" if task.samples == 1 else f"{task.samples} samples"
        raise DataError(
            f"A batch of {batch_size} is larger than the data: {task.title}, {samples}. "
            "Pass a smaller --batch-size, or more data."
        )
    options = WayOptions(setting.autocast, exact, memory_bytes)
    ways, notes = _to_be_had(ways, task)
    seeds_done: list[list[Training]] = []
    interrupted = False
    with ExitStack() as stack:
        pair = stack.enter_context(Pair(task, setting, batch_size, learning_rate)) if COMPRESSION in ways else None

        def training(way: str, seed: int) -> Training:
            if pair is not None and way == COMPRESSION:
                return CompressedTraining(pair, seed)
            return Trainee(way, task, setting, seed, batch_size, learning_rate, partial(change, way, options=options))

        try:
            for seed in seeds:
                start = time.perf_counter()
                trainings = [training(way, seed) for way in ways]
                seeds_done.append(trainings)
                building = time.perf_counter() - start
                for step in range(steps):
                    first = step % len(trainings)
                    for one in trainings[first:] + trainings[:first]:
                        one.step(step)
                        on_step(one.way)
                    if len(seeds_done) == 1 and step == min(1, steps - 1) and steps * len(seeds) > step + 1:
                        steps_left = (steps * len(seeds) - step - 1) * len(ways)
                        on_estimate(_seconds_left(trainings, building, steps, len(seeds)), steps_left)
                for one in trainings:
                    one.end()
        except KeyboardInterrupt:
            interrupted = True
            seeds_done = _complete_rounds(seeds_done)
            if not seeds_done:
                raise
    trial = _compared(task, setting, seeds_done, batch_size, options)
    trial.setting = _in_words(setting, steps, batch_size, len(seeds), exact)
    trial.notes += notes
    if interrupted:
        trial.interrupted = True
        taken = sum(len(trainings[0].losses) for trainings in seeds_done)
        trial.notes.append(f"interrupted after {taken} of {steps * len(seeds)} steps of each way.")
    return trial


def _to_be_had(ways: Sequence[str], task: Task) -> tuple[list[str], list[str]]:
    """The ways that the model has, and a note on each kind that it has not."""
    notes = []
    model = task.build()
    if not can_checkpoint(model):
        ways = [way for way in ways if not way_called(way).checkpointed]
        notes.append("this model can not be checkpointed, so it was trained without.")
    if SELECTIVE in ways and not repeated_blocks(model):
        ways = [way for way in ways if way != SELECTIVE]
        notes.append("this model has no repeated blocks, so it was trained without selective checkpointing.")
    return list(ways), notes


def _seconds_left(trainees: Sequence[Training], building: float, steps: int, seeds: int) -> float:
    """After the first steps of the first seed. The first of all is slower, as it warms up and is counted."""
    first = sum(trainee.seconds[0] for trainee in trainees)
    later = sum(trainee.seconds[-1] for trainee in trainees)
    taken = len(trainees[0].seconds)
    return (steps - taken) * later + (seeds - 1) * (building + first + (steps - 1) * later)


# --- the comparison -----------------------------------------------------------------------------------


def _complete_rounds(seeds_done: list[list[Training]]) -> list[list[Training]]:
    """Without the steps that not every way has taken, and the seeds without any."""
    for trainees in seeds_done:
        complete = min(len(trainee.losses) for trainee in trainees)
        for trainee in trainees:
            del trainee.losses[complete:], trainee.seconds[complete:]
    return [trainees for trainees in seeds_done if trainees[0].losses]


def _compared(
    task: Task,
    setting: Setting,
    seeds_done: list[list[Training]],
    batch_size: int,
    options: WayOptions,
) -> Trial:
    by_way = [list(trainees) for trainees in zip(*seeds_done, strict=True)]
    ended = sum(all(trainee.final_loss is not None for trainee in trainees) for trainees in seeds_done)
    runs = [_run(trainees, by_way[0], ended) for trainees in by_way]
    several = len(seeds_done) > 1
    model = task.build().to(setting.device)

    def inputs_of(size: int) -> Inputs:
        return on_device(task.batch(0, 0, size), setting.device).inputs

    inputs = inputs_of(batch_size)
    decided = decide(model, inputs, autocast=setting.autocast, exact=options.exact)
    for run in runs:
        run.predicted_peak_bytes = predicted_peak(run.name, task, setting, batch_size, options)
    if options.memory_bytes is not None:
        smaller = max(2, batch_size)  # batch norm refuses a single sample
        batches = smaller, 2 * smaller
        predicted = needs(model, inputs_of, setting, decided, batches=batches)
        if any(run.name == EXACT for run in runs):
            exactly = decide(model, inputs, autocast=setting.autocast, exact=True)
            predicted[EXACT] = needs(model, inputs_of, setting, exactly, batches=batches)[INVACT]
        for run in runs:
            if run.name in predicted:
                run.largest_batch = predicted[run.name].largest_batch(options.memory_bytes)
    return Trial(
        title=task.title,
        setting="",
        runs=runs,
        yardsticks=Yardsticks(
            spread=_largest_difference(runs[0].losses_by_seed) if several else None,
            finals=runs[0].final_losses,
            memory_bytes=options.memory_bytes,
        ),
        report=decided.report,
        layers=memory_by_layer(model, inputs, setting, decided),
        notes=[note for run in runs for note in _notes_on(run)],
    )


def _run(trainees: list[Training], baselines: list[Training], ended: int) -> Run:
    """Of one way, all seeds, of which the first so many came to an end in every way."""
    first = trainees[0]
    peaks = [trainee.peak_bytes for trainee in trainees if trainee.peak_bytes is not None]
    seconds = [time for trainee in trainees for time in trainee.seconds[1:] or trainee.seconds]
    curves = [trainee.losses for trainee in trainees], [baseline.losses for baseline in baselines]
    return Run(
        name=first.way,
        activation_bytes=first.activation_bytes,
        peak_bytes=max(peaks, default=None),
        seconds_per_step=statistics.median(seconds),
        losses=first.losses,
        losses_by_seed=[trainee.losses for trainee in trainees],
        largest_difference=max(_largest_difference(pair) for pair in zip(*curves, strict=True)),
        final_losses=[trainee.final_loss for trainee in trainees if trainee.final_loss is not None][:ended],
        processes=first.processes,
        sent_bytes=first.sent_bytes,
    )


def _notes_on(run: Run) -> list[str]:
    """What the table does not say."""
    notes = []
    if run.sent_bytes is not None:
        compressed, full = map(format_bytes, run.sent_bytes)
        notes.append(
            f"compression trains in {run.processes} processes, each with its part of the batch: bytes kept, and the "
            f"peak, are those of one. Each gives {compressed} of gradients a step to the other, in bf16; in fp32 it is "
            f"{full}. The loss is the mean of theirs, which is not quite that of the whole batch where it is a mean of "
            "masked tokens or compares samples with one another."
        )
    if run.name == SELECTIVE:
        notes.append(
            "selective keeps its products past autograd, so all that lives after its forward pass was counted."
        )
    return notes


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
