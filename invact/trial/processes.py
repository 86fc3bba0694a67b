"""Gradient compression in a trial: two processes, each with half of every batch, that share gradients in bf16."""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing.connection
import os
import shutil
import signal
import statistics
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from invact.errors.checks import Inputs
from invact.pytorch.containers import tree_map_only
from invact.simulation.setting import Setting
from invact.trial.data import DataError
from invact.trial.run import COMPRESSION
from invact.trial.task import Batch, NotTrainableError, Origin, Task
from invact.trial.trainee import Trainee

PROCESSES = 2
ANSWER_WITHIN = 1800.0  # seconds; a step of a large model on a CPU takes minutes
_REFUSALS = (DataError, NotTrainableError)


class ProcessError(RuntimeError):
    """One of the two processes ended, or gave no answer."""


@dataclass(frozen=True)
class _Job:
    """All that a process needs to know; it makes the task again."""

    origin: Origin
    setting: Setting
    batch_size: int
    learning_rate: float
    threads: int
    backend: str
    meeting_point: str


@dataclass(frozen=True)
class _Answer:
    """Of one process, about one step."""

    loss: float
    seconds: float
    activation_bytes: int
    peak_bytes: int | None
    sent_bytes: tuple[int, int]


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
        self._job = _Job(
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
                process = context.Process(target=_obey, args=(rank, self._job, theirs), daemon=True)
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

    def step(self, number: int) -> list[_Answer]:
        """Both take one step on their half of the batch."""
        answers: list[_Answer] = self._ask(("step", number))
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


# --- in the processes ---------------------------------------------------------------------------------


def _obey(rank: int, job: _Job, pipe: multiprocessing.connection.Connection) -> None:
    """Does as it is told until the pipe is closed at its other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is the report's alone
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, OSError):  # nobody is at the other end any more
        try:
            for answer in _answers(rank, job, pipe):
                pipe.send(answer)
        except _REFUSALS as error:
            pipe.send(error)
        except (EOFError, OSError):
            raise
        except Exception:
            pipe.send(RuntimeError(f"Process {rank} of gradient compression failed:\n{traceback.format_exc()}"))


def _answers(rank: int, job: _Job, pipe: multiprocessing.connection.Connection) -> Iterator[_Answer | float | None]:
    torch.set_num_threads(job.threads)
    dist.init_process_group(
        job.backend,
        init_method=f"file://{job.meeting_point}",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=ANSWER_WITHIN),
    )
    setting = _setting_of(rank, job)
    task = job.origin.make()
    sent = _Sent()
    trainee: Trainee | None = None
    while True:
        command, number = pipe.recv()
        if command == "begin":
            share = partial(_share, rank=rank, batch_size=job.batch_size)
            trainee = Trainee(COMPRESSION, task, setting, number, job.batch_size, job.learning_rate, sent.change, share)
            yield None
        elif command == "end":
            assert trainee is not None
            trainee.end()
            yield trainee.final_loss
            trainee = None
        elif trainee is not None:
            sent.elements = 0
            trainee.step(number)
            yield _Answer(
                trainee.losses[-1], trainee.seconds[-1], trainee.activation_bytes, trainee.peak_bytes, sent.nbytes()
            )


def _setting_of(rank: int, job: _Job) -> Setting:
    """On a GPU of its own, if there is one for each."""
    if job.backend != "nccl":
        return job.setting
    torch.cuda.set_device(rank)
    return replace(job.setting, device=torch.device("cuda", rank))


class _Sent:
    """Compresses gradients with PyTorch's hook, and counts them."""

    def __init__(self) -> None:
        self.elements = 0

    def change(self, model: nn.Module, inputs: Inputs) -> Callable[..., Any]:
        # A static graph may leave parameters out, as a model without its pooler does.
        parallel = DistributedDataParallel(model, static_graph=True)
        parallel.register_comm_hook(None, self._compress)
        return parallel

    def _compress(self, group, bucket):  # type: ignore[no-untyped-def]  # PyTorch refuses annotations that are strings
        self.elements += bucket.buffer().numel()
        return bf16_compress_hook(group, bucket)

    def nbytes(self) -> tuple[int, int]:
        """In bf16, and what it is in fp32."""
        return self.elements * torch.bfloat16.itemsize, self.elements * torch.float32.itemsize


def _share(batch: Batch, rank: int, batch_size: int) -> Batch:
    """Of every tensor with one row a sample, the rows of one process."""
    each = batch_size // PROCESSES

    def rows(tensor: Tensor) -> Tensor:
        return tensor[rank * each : (rank + 1) * each] if tensor.shape[:1] == (batch_size,) else tensor

    inputs, targets = tree_map_only(Tensor, rows, (batch.inputs, batch.targets))
    return Batch(inputs, targets)
