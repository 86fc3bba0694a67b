"""What each of the two processes of gradient compression does: it trains on its half of every batch, as it is told."""

from __future__ import annotations

import contextlib
import datetime
import logging
import multiprocessing.connection
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from invact.errors.checks import Inputs
from invact.pytorch.containers import tree_map_only
from invact.simulation.setting import Setting
from invact.trial.data import DataError
from invact.trial.task import Batch, NotTrainableError, Origin
from invact.trial.trainee import Trainee
from invact.trial.ways import COMPRESSION

PROCESSES = 2
ANSWER_WITHIN = 1800.0  # seconds; a step of a large model on a CPU takes minutes
_REFUSALS = (DataError, NotTrainableError)


@dataclass(frozen=True)
class Job:
    """All that a process needs to know; it makes the task again."""

    origin: Origin
    setting: Setting
    batch_size: int
    learning_rate: float
    threads: int
    backend: str
    meeting_point: str


@dataclass(frozen=True)
class Answer:
    """Of one process, about one step."""

    loss: float
    seconds: float
    activation_bytes: int
    peak_bytes: int | None
    sent_bytes: tuple[int, int]


def obey(rank: int, job: Job, pipe: multiprocessing.connection.Connection) -> None:
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


def _answers(rank: int, job: Job, pipe: multiprocessing.connection.Connection) -> Iterator[Answer | float | None]:
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
            yield Answer(
                trainee.losses[-1], trainee.seconds[-1], trainee.activation_bytes, trainee.peak_bytes, sent.nbytes()
            )


def _setting_of(rank: int, job: Job) -> Setting:
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
