"""What fits a GPU: predictions held against counts on real tensors, and the words they are told in."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from invact import patchers
from invact.arguments import device_of
from invact.checkpointing import can_checkpoint, checkpointed
from invact.cli import app
from invact.commands.options import memory_bytes
from invact.fitting_batch import Fit, Need, _region_bytes, needs, resident_bytes
from invact.planning import decide
from invact.probing import observe
from invact.simulation import Setting

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


def resident(model, copies: int) -> int:
    return copies * sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_batch_never_probed_needs_what_a_real_forward_keeps_and_two_gradients(model, predicted, count_kept):
    widest = 16 * 32 * 4 * 64 * 4  # bytes of the MLP's hidden layer in fp32: the largest tensor kept
    expected = resident(model, 4) + count_kept(model, inputs_of(16)) + 2 * widest
    assert predicted["baseline"].bytes_at(16) == pytest.approx(expected, rel=1e-3)


def test_checkpointing_needs_one_block_besides_what_it_keeps(model, predicted, count_kept):
    hidden = torch.randn(16, 32, 64, requires_grad=True)
    block = count_kept(model.transformer.h[0], (hidden,))
    with checkpointed(model):
        between = count_kept(model, inputs_of(16))
    widest = 16 * 32 * 4 * 64 * 4
    expected = resident(model, 4) + between + block + 2 * widest
    assert predicted["checkpointing"].bytes_at(16) == pytest.approx(expected, rel=0.02)


def test_where_the_logits_are_larger_than_a_block_checkpointing_needs_the_block_when_they_are_gone(count_kept):
    """As of BERT-base on an H200: 102.8 MiB a sample, where the block beside the logits' gradients made it 115.3."""
    config = GPT2Config(
        vocab_size=4096, n_positions=32, n_embd=64, n_layer=3, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config).train()
    found = needs(model, inputs_of, Setting(device_of(model)), decide(model, inputs_of(2)))
    with checkpointed(model):
        between = count_kept(model, inputs_of(16))
    logits = 16 * 32 * 4096 * 4
    assert found["checkpointing"].bytes_at(16) == pytest.approx(resident(model, 4) + between + 2 * logits, rel=0.02)


def test_each_way_needs_less_than_the_baseline_and_both_together_least(predicted):
    need = {way: predicted[way].per_sample for way in predicted}
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
    assert found["checkpointing"].per_sample < found["baseline"].per_sample


def test_what_a_user_checkpoints_is_counted_so_as_it_is(model, predicted):
    checkpointed_model = GPT2LMHeadModel(model.config).train()
    checkpointed_model.gradient_checkpointing_enable()
    found = needs(checkpointed_model, inputs_of, Setting(device_of(model)), decide(checkpointed_model, inputs_of(2)))
    assert found["baseline"] == found["checkpointing"] == predicted["checkpointing"]


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 2), ("momentum", 3), ("adamw", 4)])
def test_optimizers_keep_their_states(model, optimizer, copies):
    assert resident_bytes(model, optimizer) == resident(model, copies)


def test_a_frozen_parameter_has_neither_gradient_nor_states(model):
    embedding = model.transformer.wte.weight
    embedding.requires_grad_(False)
    try:
        assert resident_bytes(model, "adamw") == resident(model, 4) - 3 * embedding.nbytes
    finally:
        embedding.requires_grad_(True)


def test_autocast_copies_of_weights_do_not_grow_with_the_batch(model):
    fixed = needs(model, inputs_of, Setting(device_of(model), torch.bfloat16), decide(model, inputs_of(2)))[
        "baseline"
    ].constant
    assert 0 < fixed - resident(model, 4) <= resident(model, 1) // 2


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/swin_tiny_patch4_window7_224"])
def test_regions_are_as_many_as_the_checkpoints(name):
    model = patchers.load(name)
    inputs, setting = patchers.example_inputs(model, 2), Setting(torch.device("cuda"))
    with checkpointed(model):
        closed, opened = (observe(model, inputs, setting, checkpointing=on) for on in (True, False))
    assert len(_region_bytes(model, opened, closed)) == closed.checkpoints > 0


WAYS = {
    "baseline": Need(100, 10),
    "invact": Need(100, 8),
    "checkpointing": Need(100, 4),
    "invact+checkpointing": Need(100, 3),
}


@pytest.mark.parametrize(
    ("target", "way", "words"),
    [
        (90, "baseline", "nothing needed"),
        (100, "invact", "invact alone"),
        (200, "checkpointing", "needs checkpointing"),
        (300, "invact+checkpointing", "needs both"),
        (301, None, "nothing here makes it fit"),
    ],
)
def test_the_cheapest_way_that_fits_is_named(target, way, words):
    fit = Fit(1000, "adamw", WAYS, target)
    assert fit.way_for_target == way
    assert words in str(fit)
    assert "expandable_segments:True" in str(fit)


def test_nothing_fits_where_the_weights_do_not():
    assert Need(100, 10).largest_batch(99) == 0


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
    with pytest.raises(typer.BadParameter, match=message):
        memory_bytes(text)


def run(*arguments: str):
    return CliRunner().invoke(app, ["patch", "--model", "timm/test_vit", "--batch-size", "2", *arguments])


def test_dry_run_says_what_fits_in_words_and_in_json():
    result = run("--gpu-memory", "1GiB", "--target-batch", "8", "--json")
    assert result.exit_code == 0, result.output
    fit = json.loads(result.stdout)["fit"]
    batches = fit["largest_batch"]
    assert 8 < batches["baseline"] < batches["invact"] < batches["invact+checkpointing"]
    assert fit["way_for_target"] == "baseline"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-batch", "8"], "Add --gpu-memory"),
        (["--gpu-memory", "24 parsecs"], "is no amount of memory"),
        (["--gpu-memory", "24"], "'24' has no unit. Write it as 24GiB"),
        (["--gpu-memory", "1GiB", "--optimizer", "lion"], "--optimizer"),
    ],
)
def test_bad_input_exits_2_with_one_message(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert "Traceback" not in result.stderr
