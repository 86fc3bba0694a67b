"""What fits a GPU: predictions held against counts on real tensors, and the words they are told in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from real_steps import counted_peak
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from invact.cli import app
from invact.fitting.batches import Batches, Need, needs
from invact.patchers.checkpointing import can_checkpoint, checkpointed
from invact.planning.plans import decide, decide_for_device
from invact.report.amounts import memory_bytes
from invact.simulation.setting import Setting, device_of

GIB = 2**30


@pytest.fixture(scope="module")
def model():
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=64, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).train()


def inputs_of(batch_size: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch_size * 32).view(batch_size, 32) % 64
    return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def predicted(model) -> dict[str, Need]:
    return needs(model, inputs_of, Setting(device_of(model)), decide(model, inputs_of(2)))


@pytest.mark.parametrize("batch", [3, 16, 40])
def test_a_batch_never_simulated_needs_what_a_real_step_does(model, predicted, batch):
    """Inverting on a CPU takes large tensors in pieces, so of them less is needed than small ones let expect."""
    decided = decide(model, inputs_of(2))
    ways = {
        "baseline": nullcontext,
        "invact": lambda: decided.applied(model),
        "checkpointing": lambda: checkpointed(model),
    }
    for way, around in ways.items():
        with around():
            peak, _ = counted_peak(model, inputs_of(batch))
        said = predicted[way].bytes_at(batch)
        assert said == pytest.approx(peak, rel=1e-3) if way != "invact" or batch == 3 else said > 0.95 * peak


def test_where_the_logits_are_larger_than_a_block_that_is_predicted_too():
    config = GPT2Config(
        vocab_size=4096, n_positions=32, n_embd=64, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).train()
    found = needs(model, inputs_of, Setting(device_of(model)), decide(model, inputs_of(2)))
    with checkpointed(model):
        peak, _ = counted_peak(model, inputs_of(16))
    assert found["checkpointing"].bytes_at(16) == pytest.approx(peak, rel=1e-3)


def test_on_a_gpu_each_way_needs_less_than_the_baseline_and_both_together_least(model):
    decided = decide_for_device(model, inputs_of(2))
    found = needs(model, inputs_of, Setting(torch.device("cuda")), decided)
    need = {way: found[way].bytes_at(64) for way in found}
    assert list(need) == ["baseline", "invact", "checkpointing", "invact+checkpointing"]
    assert need["invact+checkpointing"] < min(need["invact"], need["checkpointing"])
    assert max(need["invact"], need["checkpointing"]) < need["baseline"]


def test_the_model_is_left_as_it_was(model, predicted):
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert "Inverted" not in repr(model)


class Switched(torch.nn.Module):
    """A model of no library whose switch changes whatever it likes, and may fail half way."""

    def __init__(self, *, works: bool):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.works = works

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.inner.checkpointing = enable
        self.inner.register_forward_hook(print)
        if not self.works:
            raise ValueError("not supported")


@pytest.mark.parametrize("works", [True, False])
def test_asking_for_checkpointing_changes_nothing(works):
    model = Switched(works=works)
    attributes = [dict(vars(module)) for module in model.modules()]
    assert can_checkpoint(model) == works
    assert [dict(vars(module)) for module in model.modules()] == attributes
    assert not model.inner._forward_hooks


def checkpointing_state(model):
    of_flags = [
        (vars(m).get("gradient_checkpointing"), vars(m).get("_gradient_checkpointing_func")) for m in model.modules()
    ]
    hooks = [list(m._forward_hooks.items()) for m in model.modules()]
    return of_flags, hooks, vars(model).get("_require_grads_hooks"), vars(model).get("_require_grads_hook")


@pytest.fixture
def checkpointed_in_places():
    """All layers but one, with options of its own, and the embedding made to give gradients."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=4, n_head=2)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.transformer.h[1].gradient_checkpointing = False
    return model


def test_a_users_own_checkpointing_stays_as_it_was_through_asking_and_planning(checkpointed_in_places):
    model = checkpointed_in_places
    before = checkpointing_state(model)
    assert before[1] != [[]] * len(before[1])  # the hooks are there to be lost
    assert can_checkpoint(model)
    assert checkpointing_state(model) == before
    with checkpointed(model):
        assert model.transformer.h[1].gradient_checkpointing
    assert checkpointing_state(model) == before
    found = needs(model, inputs_of, Setting(device_of(model)), decide(model, inputs_of(2)))
    assert checkpointing_state(model) == before
    assert found["checkpointing"].bytes_at(64) < found["baseline"].bytes_at(64)


def test_what_a_user_checkpoints_is_counted_so_as_it_is(model, predicted):
    checkpointed_model = GPT2LMHeadModel(model.config).train()
    checkpointed_model.gradient_checkpointing_enable()
    found = needs(checkpointed_model, inputs_of, Setting(device_of(model)), decide(checkpointed_model, inputs_of(2)))
    assert found["baseline"] == found["checkpointing"] == predicted["checkpointing"]


@pytest.mark.parametrize(("optimizer", "copies"), [("none", 2), ("sgd", 2), ("momentum", 3), ("adamw", 4)])
def test_weights_gradients_and_states_are_needed_whatever_the_batch(model, optimizer, copies):
    found = needs(model, inputs_of, Setting(device_of(model)), decide(model, inputs_of(2)), optimizer=optimizer)
    weights = sum(p.nbytes for p in model.parameters())
    constant, per_sample = found["baseline"].lines[-1]
    assert per_sample < 1000  # the optimizer's step, beside the inputs
    assert copies * weights <= constant <= (copies + 1) * weights


# --- the largest batch --------------------------------------------------------------------------------


def test_the_largest_batch_is_the_last_that_fits():
    need = Need(((100, 10), (140, 2)))
    assert need.bytes_at(4) == 148
    for memory in range(142, 400):
        batch = need.largest_batch(memory)
        assert need.bytes_at(batch) <= memory < need.bytes_at(batch + 1)


def test_a_real_step_with_the_largest_batch_fits_and_with_one_sample_more_does_not(model, predicted):
    memory = 16 << 20
    batch = predicted["baseline"].largest_batch(memory)
    assert batch > 4
    assert counted_peak(model, inputs_of(batch))[0] <= memory < counted_peak(model, inputs_of(batch + 1))[0]


def test_nothing_fits_where_the_weights_do_not():
    assert Need(((100, 10),)).largest_batch(99) == 0


def test_what_grows_with_no_batch_and_fits_lets_any_batch_fit():
    assert Need(((100, 0), (50, 10))).largest_batch(1000) == 95


def test_batches_are_told_in_words_and_as_a_dict():
    batches = Batches(1000, "adamw", {"baseline": Need(((100, 10),)), "invact+checkpointing": Need(((100, 3),))})
    assert str(batches) == "Largest batch in 1000 B with adamw: 90 as it is, 300 with both."
    assert batches.to_dict()["largest_batch"] == {"baseline": 90, "invact+checkpointing": 300}


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("24GiB", 24 * GIB),
        ("80 GB", 80 * 10**9),
        ("1.5gib", 3 * GIB // 2),
        ("512MiB", GIB // 2),
        ("1MiB", 2**20),
        ("24 gb", 24 * 10**9),
    ],
)
def test_memory_is_read_with_its_unit(text, nbytes):
    assert memory_bytes(text) == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24", "'24' has no unit. Write it as 24GiB or 24GB."),
        ("1.5", "has no unit. Write it as 1.5GiB"),
        ("24 B", "less than any GPU has"),
        ("24b", "less than any GPU has"),
        ("1023KiB", "less than any GPU has"),
        ("0GiB", "less than any GPU has"),
        ("-1GiB", "is no amount of memory"),
        ("GiB", "is no amount of memory"),
        ("", "is no amount of memory"),
    ],
)
def test_memory_without_a_unit_or_too_little_of_it_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        memory_bytes(text)


def run(*arguments: str):
    return CliRunner().invoke(app, ["patch", "--model", "timm/test_vit", *arguments])


@pytest.fixture(scope="module")
def fit() -> dict[str, Any]:
    """What the dry run says of the batches that fit into a GiB."""
    result = run("--gpu-memory", "1GiB", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["fit"]


def test_dry_run_says_the_largest_batches_in_words_and_in_json(fit):
    batches = fit["largest_batch"]
    assert 8 < batches["baseline"] < batches["invact"] < batches["invact+checkpointing"]
    assert fit["needs"].keys() == batches.keys()
    assert "Largest batch in 1.00 GiB with adamw: " in " ".join(run("--gpu-memory", "1GiB").stdout.split())


def test_dry_run_plans_a_batch_that_is_named(fit):
    largest = fit["largest_batch"]
    between = (largest["invact"] + largest["invact+checkpointing"]) // 2
    report = json.loads(run("--gpu-memory", "1GiB", "--batch-size", str(between), "--json").stdout)
    assert "fit" not in report
    assert report["checkpointed"]
    assert report["peak_bytes"] <= report["memory_bytes"] == 1 << 30 < report["peak_bytes_before"]
    loose = json.loads(run("--gpu-memory", "80GiB", "--batch-size", "2", "--json").stdout)
    assert loose["checkpointed"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "24 parsecs"], "is no amount of memory"),
        (["--gpu-memory", "24"], "'24' has no unit. Write it as 24GiB"),
        (["--gpu-memory", "1GiB", "--optimizer", "lion"], "--optimizer"),
        (["--gpu-memory", "1GiB", "--target-batch", "8"], "No such option"),
    ],
)
def test_bad_input_exits_2_with_one_message(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_batch_that_does_not_fit_exits_1_with_what_would():
    result = run("--gpu-memory", "1MiB", "--batch-size", "2", "--json")
    assert result.exit_code == 1
    assert "A step takes" in result.stderr
    assert json.loads(result.stdout)["peak_bytes"] > 1 << 20
