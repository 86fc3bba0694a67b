"""Gradient compression in a trial: two processes, each with half of every batch, that share gradients in bf16."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import shutil
import signal
import statistics
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from invact.simulation.setting import Setting
from invact.trial.data import DataError
from invact.trial.task import NotTrainableError, Task
from invact.trial.ways import COMPRESSION
from invact.trial.worker import ANSWER_WITHIN, PROCESSES, Answer, Job, obey


class ProcessError(RuntimeError):
    """One of the two processes ended, or gave no answer."""


class Pair:
    """Two processes that wait for commands; they end with the block, whatever happens in it, or with this process.

    Raises:
        DataError: a batch can not be halved.
        NotTrainableError: the task was not made by `make_task`, so that no other process can make it again.
    """

    def __init__(self, task: Task, setting: Setting, batch_size: int, learning_rate: float) -> None:
        if batch_size % PROCESSES:
            raise DataError(
                f"Gradient compression halves each batch between two processes, and {batch_size} is odd. "
                "Pass an even --batch-size."
            )
        if task.origin is None:
            raise NotTrainableError(
                f"{task.title} can not be trained in two processes: it was put together here, and they would not know "
                "how. Name a model, or leave out gradient compression."
            )
        several_gpus = setting.device.type == "cuda" and torch.cuda.device_count() >= PROCESSES
        self._folder = Path(tempfile.mkdtemp(prefix="invact-trial-"))
        self._job = Job(
            task.origin,
            setting,
            batch_size,
            learning_rate,
            threads=max(1, torch.get_num_threads() // PROCESSES),
            backend="nccl" if several_gpus else "gloo",
            meeting_point=str(self._folder / "meeting"),
        )
        self._processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []

    def __enter__(self) -> Pair:
        context = mp.get_context("spawn")
        try:
            for rank in range(PROCESSES):
                ours, theirs = context.Pipe()
                process = context.Process(target=obey, args=(rank, self._job, theirs), daemon=True)
                with _interrupts_held_off():
                    process.start()
                theirs.close()  # so that its end is seen here when the process ends
                self._processes.append(process)
                self._pipes.append(ours)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # it may wait for the other one, and has nothing to save
            process.join()
        self._pipes, self._processes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, seed: int) -> None:
        """Both build the model anew, from this seed."""
        self._ask(("begin", seed))

    def step(self, number: int) -> list[Answer]:
        """Both take one step on their half of the batch."""
        answers: list[Answer] = self._ask(("step", number))
        return answers

    def end(self) -> float:
        """Both give up the model; the mean of its final losses on their halves."""
        losses: list[float] = self._ask(("end", 0))
        return statistics.fmean(losses)

    def _ask(self, command: tuple[str, int]) -> list[Any]:
        """What both answer; the first that fails is told of, since the other one waits for it."""
        try:
            for pipe in self._pipes:
                pipe.send(command)
            answers: dict[Any, Any] = {}
            while len(answers) < PROCESSES:
                ready: list[Any] = multiprocessing.connection.wait(
                    set(self._pipes) - answers.keys(), timeout=ANSWER_WITHIN
                )
                if not ready:
                    raise ProcessError(
                        f"A process of gradient compression gave no answer within {ANSWER_WITHIN:.0f} seconds. "
                        "Train a smaller model, or leave gradient compression out."
                    )
                for answered in ready:
                    answers[answered] = answered.recv()
                    if isinstance(answers[answered], Exception):
                        raise answers[answered]
        except (EOFError, OSError):
            raise ProcessError(
                "A process of gradient compression ended before it had answered, as it does where memory is short. "
                "Pass a smaller --batch-size, or leave gradient compression out."
            ) from None
        return [answers[pipe] for pipe in self._pipes]


class CompressedTraining:
    """A `Training` by the two processes, from one seed: the mean of their losses, the longer of their times."""

    way = COMPRESSION
    processes = PROCESSES

    def __init__(self, pair: Pair, seed: int) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.activation_bytes = 0
        self.peak_bytes: int | None = None
        self.sent_bytes: tuple[int, int] | None = None
        self.final_loss: float | None = None
        self._pair = pair
        pair.begin(seed)

    def step(self, number: int) -> None:
        """As of `Training`."""
        answers = self._pair.step(number)
        self.losses.append(statistics.fmean(answer.loss for answer in answers))
        self.seconds.append(max(answer.seconds for answer in answers))
        self.activation_bytes = max(answer.activation_bytes for answer in answers)
        self.peak_bytes = max((answer.peak_bytes for answer in answers if answer.peak_bytes is not None), default=None)
        self.sent_bytes = answers[0].sent_bytes

    def end(self) -> None:
        """As of `Training`."""
        self.final_loss = self._pair.end()


@contextlib.contextmanager
def _interrupts_held_off() -> Iterator[None]:
    """What is started inside the block inherits it: Ctrl-C ends this process, and this one ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
