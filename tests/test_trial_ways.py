"""The ways of training that a trial compares on demand, and the small models that it trains."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner, Result

from invact.cli import app
from invact.commands.adapters import Adapters
from invact.commands.trial import Also
from invact.fitting.blocks import repeated_blocks
from invact.fitting.lifetimes import WEIGHT, Lifetimes
from invact.trial.changing import WayOptions, change
from invact.trial.comparing import train_in_ways
from invact.trial.data import DataError
from invact.trial.selective import checkpoint_selectively
from invact.trial.task import Batch, NotTrainableError, Task, make_task
from invact.trial.ways import ON_DEMAND

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trial", *(str(argument) for argument in arguments)])


def blocks(count: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(count)))


def task_of(model: nn.Module) -> Task:
    return Task(
        "a plain model",
        samples=4,
        build=lambda: model,
        batch=lambda seed, step, size: Batch((torch.ones(size, 8),)),
        loss=lambda forward, batch: forward(*batch.inputs).square().mean(),
    )


def test_the_command_offers_every_way_on_demand():
    assert [way.value for way in Also if way is not Also.all] == list(ON_DEMAND)


@pytest.mark.parametrize("name", [pytest.param("small-bert", marks=pytest.mark.slow), "small-gpt2", "small-llama"])
def test_exact_and_selective_learn_what_the_baseline_learns_bit_for_bit_and_keep_less(name: str):
    ways = ["baseline", "invact", "exact", "selective"]
    result = train_in_ways(make_task(name, seq_len=16), steps=2, batch_size=2, seeds=[0, 1], ways=ways)
    kept = {run.name: run.activation_bytes for run in result.runs}
    assert [run.name for run in result.runs] == ways
    assert result.run("exact").losses_by_seed == result.runs[0].losses_by_seed
    assert result.run("selective").losses_by_seed == result.runs[0].losses_by_seed
    assert kept["exact"] < 0.8 * kept["baseline"]
    assert kept["selective"] < 0.9 * kept["baseline"]
    assert "For this workload use" in result.verdict


def test_selective_checkpointing_is_counted_as_the_baseline_is():
    """Where every operation of a block is kept, and what it reads, as much is kept as without checkpointing."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(3)))
    ways = ["baseline", "invact", "selective"]
    kept = [run.activation_bytes for run in train_in_ways(task_of(model), steps=1, batch_size=4, ways=ways).runs]
    the_loss = 4
    assert kept[2] == kept[0] + the_loss


def test_selective_checkpointing_gives_the_same_gradients_and_multiplies_nothing_twice():
    torch.manual_seed(0)
    stock, selective = blocks(), blocks()
    selective.load_state_dict(stock.state_dict())
    checkpoint_selectively(selective)
    x = torch.randn(4, 8)
    stock(x).sum().backward()
    with Products() as products:
        selective(x).sum().backward()
    for one, other in zip(stock.parameters(), selective.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert products.count == 6 + 2 * 6 - 1  # forward; backward by weight and by input, of which the first needs none


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def test_repeated_blocks_are_layers_and_not_single_operators():
    assert repeated_blocks(blocks(2)) == ["0", "1"]
    assert repeated_blocks(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == []
    assert repeated_blocks(make_task("small-bert").build()) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_without_repeated_blocks_selective_is_left_out_with_a_note_and_refused_by_itself():
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    result = train_in_ways(task_of(model), steps=1, batch_size=4, ways=["baseline", "invact", "selective"])
    assert [run.name for run in result.runs] == ["baseline", "invact"]
    assert "no repeated blocks" in " ".join(result.notes)
    with pytest.raises(ValueError, match=r"Sequential has no blocks that repeat .* Put its layers into"):
        checkpoint_selectively(model)


def test_alive_bytes_are_of_what_was_made_inside_and_still_lives():
    before = torch.ones(100)
    lifetimes = Lifetimes()
    lifetimes.see(before, WEIGHT)
    with lifetimes:
        kept, view, dropped = before + 1, before[:10], torch.ones(1000)
        del dropped
    assert lifetimes.alive_bytes() == 400
    del kept, view
    assert lifetimes.alive_bytes() == 0


def test_a_way_that_there_is_not_is_an_error_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"no way of training called 'fewbits'\. There are: baseline, .*fewbit-4"):
        change("fewbits", blocks(), (torch.ones(2, 8),), WayOptions())


@pytest.mark.parametrize("name", ["small-bert", "small-gpt2", "small-llama"])
def test_small_models_are_built_anew_from_the_seed_and_drop_nothing(name: str):
    build = make_task(name, seq_len=16).build
    torch.manual_seed(3)
    first = build().state_dict()
    torch.manual_seed(3)
    again = build()
    assert again.training
    assert all(torch.equal(value, first[key]) for key, value in again.state_dict().items())
    assert not any(isinstance(layer, nn.Dropout) and layer.p for layer in again.modules())


def test_the_origin_of_a_task_makes_the_same_task():
    task = make_task("small-llama", seq_len=16)
    assert task.origin is not None
    again = task.origin.make()
    assert again.title == task.title
    assert torch.equal(again.batch(1, 2, 3).inputs["input_ids"], task.batch(1, 2, 3).inputs["input_ids"])


def test_more_bits_of_a_derivative_are_nearer_to_the_baseline_and_named_approximate():
    ways = ["baseline", "invact", "fewbit-1", "fewbit-4"]
    result = train_in_ways(make_task("small-gpt2", seq_len=16), steps=3, batch_size=2, seeds=[0, 1], ways=ways)
    one, four = result.run("fewbit-1"), result.run("fewbit-4")
    assert 0 < four.largest_difference < one.largest_difference
    assert one.activation_bytes < four.activation_bytes < result.runs[0].activation_bytes
    named = [row[0] for row in result.rows()]
    assert named == ["way", "baseline", "invact", "fewbit-1 (approximate)", "fewbit-4 (approximate)"]


def test_adapters_alone_are_trained_and_another_process_can_make_them():
    adapters = Adapters(4, 0.0, ["q_proj", "v_proj"], in_4bit=False)
    task = make_task("small-llama", seq_len=16, adapters=adapters)
    trained = [name for name, p in task.build().named_parameters() if p.requires_grad]
    assert len(trained) == 8  # two of each of two layers' two
    assert all("lora" in name for name in trained)
    assert task.title.endswith("LoRA rank 4 on q_proj and v_proj")
    again = pickle.loads(pickle.dumps(task.origin)).make()
    assert [name for name, p in again.build().named_parameters() if p.requires_grad] == trained
    result = train_in_ways(task, steps=2, batch_size=2, ways=["baseline", "invact", "exact", "selective"])
    assert result.run("exact").losses == result.run("selective").losses == result.runs[0].losses


def test_final_losses_are_of_the_same_samples_for_all_and_the_verdict_says_by_how_much_they_differ():
    result = train_in_ways(make_task(seq_len=16), steps=2, batch_size=2, seeds=[0, 1], ways=["baseline", "invact"])
    stock, patched = result.runs
    assert patched.final_losses == pytest.approx(stock.final_losses, abs=1e-5)
    assert result.yardsticks.final_spread == abs(stock.final_losses[0] - stock.final_losses[1]) > 0
    as_json = json.loads(result.to_json())
    assert as_json["final_spread"] == result.yardsticks.final_spread
    assert [run["within_spread"] for run in as_json["runs"]] == [True, True]


def test_the_learning_rate_is_that_of_the_optimiser_and_checkpointing_can_be_left_out():
    options = ["--steps", 3, "--seeds", 1, "--batch-size", 2, "--seq-len", 16, "--no-checkpointing", "--json"]
    slow, fast = (json.loads(run(*options, "--learning-rate", rate).stdout)["runs"] for rate in (0, 1e-2))
    assert [one["name"] for one in slow] == ["baseline", "invact"]
    assert slow[0]["losses"][0] == fast[0]["losses"][0]
    assert slow[0]["losses"][2] != fast[0]["losses"][2]


def test_compression_needs_a_batch_that_can_be_halved_and_a_task_that_others_can_make():
    ways = ["baseline", "invact", "compression"]
    with pytest.raises(DataError, match=r"halves each batch .* 3 is odd"):
        train_in_ways(make_task(), steps=1, batch_size=3, ways=ways)
    with pytest.raises(NotTrainableError, match="can not be trained in two processes"):
        train_in_ways(task_of(blocks()), steps=1, batch_size=4, ways=ways)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--also", "magic"], "'magic' is not one of"),
        (["--also", "fit"], "The way fit is to fit a memory, and none was named"),
        (["--also", "compression", "--batch-size", 3], "3 is odd"),
        (["--lora-dropout", 0.1], "--lora-dropout says how LoRA adapters are to be, and there are none"),
        (["--lora-targets", "q_proj"], "--lora-targets says how LoRA adapters are to be, and there are none"),
        (["--lora-rank", 0], "The LoRA rank is 0"),
        (["--lora-rank", 4, "--lora-targets", "nothing"], "nothing"),
        (["small-gpt3"], "small-gpt3"),
    ],
)
def test_bad_input_exits_2_with_one_sentence_and_no_traceback(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert message in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr
