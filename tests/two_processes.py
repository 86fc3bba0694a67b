"""Two processes over gloo that run one piece of work after another: starting them is what takes time."""

import datetime
import multiprocessing.connection
import traceback
import uuid

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def rank_loop(rank, meeting_point, pipe):
    """Runs one piece of work after another; the imports are what takes time."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS, timeout=timeout)
    while True:
        work, options = pipe.recv()
        try:
            work(rank, **options)
            dist.barrier()
        except Exception:
            pipe.send(f"rank {rank}:\n{traceback.format_exc()}")
            return
        pipe.send(None)


class TwoProcesses:
    def __init__(self, folder):
        self._folder = folder
        self._processes, self._pipes = [], []

    def run(self, work, **options):
        """Runs `work(rank, **options)` in both processes; what is raised in one fails here."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((work, options))
        ready = multiprocessing.connection.wait(self._pipes, timeout=120)
        answers = [pipe.recv() for pipe in ready] or ["no answer within two minutes"]
        if not any(answers):
            answers += [pipe.recv() for pipe in self._pipes if pipe not in ready]
        if any(answers):
            self.stop()  # the other rank may wait for the one that failed
            pytest.fail(next(filter(None, answers)), pytrace=False)

    def _start(self):
        context = mp.get_context("spawn")
        meeting_point = self._folder / uuid.uuid4().hex
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=rank_loop, args=(rank, meeting_point, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
