"""Gradient compression in a trial: two processes that take their turn, and end with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from invact.simulation.setting import Setting
from invact.trial import processes as trial_processes
from invact.trial.comparing import train_in_ways
from invact.trial.data import DataError
from invact.trial.processes import Pair, ProcessError
from invact.trial.task import Origin, make_task

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.distributed]

CPU = Setting(torch.device("cpu"))


def children_of(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def ended(processes: list[int]) -> bool:
    """Within a while; what was ended by its parent may be a zombie for a moment."""
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{process}") for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(os.path.exists(f"/proc/{process}") for process in processes)


def test_halves_keep_half_send_half_and_learn_what_the_baseline_learns_to_rounding():
    task = make_task("small-gpt2", seq_len=16)
    result = train_in_ways(task, steps=3, batch_size=4, seeds=[0, 1], ways=["baseline", "invact", "compression"])
    stock, halves = result.runs[0], result.run("compression")
    assert halves.processes == 2
    assert halves.activation_bytes == pytest.approx(stock.activation_bytes / 2, rel=0.01)
    assert 0 < halves.largest_difference < 0.01  # gradients are rounded to bf16
    trained = sum(p.numel() for p in task.build().parameters())
    assert halves.sent_bytes == (2 * trained, 4 * trained)
    assert "2 x " in dict(zip(*result.rows()[:: len(result.rows()) - 1], strict=True))["kept for backward"]
    assert "Each gives" in " ".join(result.notes)
    assert not multiprocessing.active_children()


def test_what_a_process_refuses_is_raised_here():
    elsewhere = replace(make_task(), origin=Origin(data="no/such/file.txt"))
    with Pair(elsewhere, CPU, 2, 5e-4) as pair, pytest.raises(DataError, match=r"There is no no/such/file.txt"):
        pair.begin(0)
    assert not multiprocessing.active_children()


def test_a_process_that_is_ended_by_somebody_else_is_an_error_with_a_sentence():
    with Pair(make_task(seq_len=16), CPU, 2, 5e-4) as pair:
        pair.begin(0)
        pair._processes[1].kill()
        with pytest.raises(ProcessError, match="ended before it had answered"):
            pair.step(0)
    assert not multiprocessing.active_children()


def test_no_answer_in_time_is_an_error_with_a_sentence(monkeypatch):
    monkeypatch.setattr(trial_processes, "ANSWER_WITHIN", 0.01)
    with Pair(make_task(seq_len=16), CPU, 2, 5e-4) as pair, pytest.raises(ProcessError, match="no answer within"):
        pair.begin(0)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("way_to_end", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_trial(way_to_end: signal.Signals):
    command = [sys.executable, "-m", "invact", "trial", "--also", "compression", "--steps", "100000", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("About"):  # every way has taken two steps
            break
    workers = children_of(process.pid)
    assert len(workers) >= 2
    if way_to_end is signal.SIGINT:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    else:
        process.kill()
    printed, said = process.communicate(timeout=120)
    assert ended(workers)
    if way_to_end is signal.SIGINT:
        assert process.returncode == 130
        assert json.loads(printed)["interrupted"] is True
        assert "Traceback" not in said
