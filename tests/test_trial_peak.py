"""The peak that a trial predicts for each way of training, against a count of all that lives in a real step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from invact.simulation.setting import Setting
from invact.trial.changing import WayOptions, change
from invact.trial.comparing import train_in_ways
from invact.trial.peak import predicted_peak
from invact.trial.task import Batch, NotTrainableError, Task, make_task
from invact.trial.trainee import Trainee
from invact.trial.ways import COMPILED_WAYS, WAYS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Setting(torch.device("cpu"))
GPT2 = make_task("small-gpt2", seq_len=32)


class Highest(TorchDispatchMode):
    """Asks after every operation which storages still live, of those it was given and those that operations gave."""

    def __init__(self, there_before: list[Tensor]) -> None:
        super().__init__()
        self.living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.highest = 0
        self._see(there_before)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._see(out)
        return out

    def _see(self, values: object) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.living.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.living = {key: pair for key, pair in self.living.items() if not pair[0].expired()}
        self.highest = max(self.highest, sum(nbytes for _, nbytes in self.living.values()))


def counted_peak(way: str, task: Task, batch_size: int, options: WayOptions) -> int:
    """Of the second step, to which AdamW has its states."""
    trainee = Trainee(way, task, CPU, 0, batch_size, 1e-3, partial(change, way, options=options))
    trainee.step(0)
    model, optimizer, batch = trainee._model, trainee._optimizer, trainee._batch(1)
    optimizer.zero_grad()
    states = [state for of_one in optimizer.state.values() for state in of_one.values()]
    with Highest(
        [*model.parameters(), *model.buffers(), *states, *tree_leaves((batch.inputs, batch.targets))]
    ) as count:
        trainee._loss(batch).backward()
        optimizer.step()
    return count.highest


def classified() -> Task:
    """A task whose model does not compute its loss."""

    def build() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))

    def batch(seed: int, step: int, size: int) -> Batch:
        return Batch((torch.ones(size, 64),), torch.zeros(size, dtype=torch.int64))

    return Task(
        "classes", 512, build, batch, lambda forward, batch: F.cross_entropy(forward(*batch.inputs), batch.targets)
    )


@pytest.mark.parametrize("way", [*WAYS, "exact", "selective", "fewbit-1", "fewbit-4"])
def test_the_peak_of_every_way_is_predicted_as_counted(way: str):
    predicted = predicted_peak(way, GPT2, CPU, 8, WayOptions())
    assert predicted == pytest.approx(counted_peak(way, GPT2, 8, WayOptions()), rel=0.001)


@pytest.mark.parametrize("way", ["baseline", "invact", "selective"])
def test_a_loss_that_is_the_tasks_own_is_part_of_the_step(way: str):
    predicted = predicted_peak(way, classified(), CPU, 512, WayOptions())
    assert predicted == pytest.approx(counted_peak(way, classified(), 512, WayOptions()), rel=0.001)


def test_a_process_of_gradient_compression_has_half_the_batch_and_buckets_as_large_as_the_gradients():
    half = predicted_peak("baseline", GPT2, CPU, 4, WayOptions())
    gradients = sum(p.nbytes for p in GPT2.build().parameters())
    assert half is not None
    assert predicted_peak("compression", GPT2, CPU, 8, WayOptions()) == half + gradients


def test_what_is_compiled_and_what_does_not_run_on_simulated_tensors_has_no_prediction():
    assert predicted_peak(COMPILED_WAYS[0], GPT2, CPU, 4, WayOptions()) is None

    def loss(forward, batch):
        found = F.cross_entropy(forward(*batch.inputs), batch.targets)
        return found * 2 if found.item() > 1 else found

    task = classified()
    read_on_the_way = Task(task.title, task.samples, task.build, task.batch, loss)
    assert predicted_peak("baseline", read_on_the_way, CPU, 4, WayOptions()) is None


# --- the way "fit" ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bounds() -> tuple[int, int]:
    """Of the step with all blocks checkpointed, and of the patched one."""
    torch.set_num_threads(1)
    lowest, highest = (predicted_peak(way, GPT2, CPU, 8, WayOptions()) for way in ("invact+checkpointing", "invact"))
    assert lowest is not None
    assert highest is not None
    assert lowest < highest
    return lowest, highest


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fit_meets_every_budget_from_all_checkpointed_to_none(share: float, bounds: tuple[int, int]):
    lowest, highest = bounds
    options = WayOptions(memory_bytes=round(lowest + share * (highest - lowest)))
    peak = predicted_peak("fit", GPT2, CPU, 8, options)
    assert peak is not None
    assert lowest <= peak <= options.memory_bytes
    assert (peak == highest) == (share == 1)
    assert counted_peak("fit", GPT2, 8, options) <= options.memory_bytes


def test_a_trial_within_a_memory_refuses_the_ways_whose_peak_is_above_it(bounds: tuple[int, int]):
    lowest, highest = bounds
    memory = (lowest + highest) // 2
    ways = ["baseline", "invact", "fit"]
    result = train_in_ways(GPT2, steps=2, batch_size=8, ways=ways, memory_bytes=memory)
    stock, patched, fitted = (run.predicted_peak_bytes for run in result.runs)
    assert fitted <= memory < patched < stock
    assert patched == highest
    assert "use fit: of the ways that fit in" in result.verdict
    assert "baseline does not fit in" in result.verdict
    assert result.run("fit").largest_difference < 1e-4
    assert "peak, predicted" in result.rows()[0]
    for run in result.runs[:2]:
        assert (run.largest_batch >= 8) == (run.predicted_peak_bytes <= memory)


def test_a_memory_that_nothing_fits_is_said_to_be_too_small(bounds: tuple[int, int]):
    lowest, _ = bounds
    with pytest.raises(NotTrainableError, match="blocks checkpointed"):
        train_in_ways(GPT2, steps=1, batch_size=8, ways=["baseline", "invact", "fit"], memory_bytes=lowest - 2**16)
