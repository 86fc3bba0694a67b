"""`invact.fit`: real steps stay within the budget, with one block fewer they do not, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from described import described
from real_steps import counted_peak, loss_of
from small_trained import gpt2, inputs_for, llama, sequential, vit
from torch import nn

import invact
from invact.fitting.blocks import repeated_blocks
from invact.fitting.choosing import DoesNotFitError, fit_in
from invact.fitting.recomputing import blocks_of, foreseen_peak
from invact.fitting.simulated_training import simulated_training
from invact.planning.plans import decide

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

BUDGETS = (0.0, 0.3, 0.5, 0.75, 0.95)
"""Shares of the way from all blocks checkpointed to none."""


def least_and_most(decided, model, inputs, optimizer="sgd"):
    """The peak of a step with all blocks checkpointed, and with none."""
    steps = []
    with simulated_training(model, inputs, decided.setting, optimizer) as take_step:
        for paths in (repeated_blocks(model), []):
            decided.checkpointed[:] = paths
            with decided.applied(model):
                steps.append(take_step(with_work=True))
    return steps


def budget_for(model, inputs, share=0.5, optimizer="sgd", **options):
    least, most = least_and_most(decide(model, inputs, **options), model, inputs, optimizer)
    return int(least.peak_bytes + share * (most.peak_bytes - least.peak_bytes))


MODELS = {
    "gpt2": lambda: gpt2(dropout=0, layers=4),
    "gpt2 with dropout": lambda: gpt2(layers=4),
    "llama": lambda: llama(layers=4),
    "vit": lambda: vit(layers=4, dropout=0),
    "vit with dropout": lambda: vit(layers=4),
}


# --- the budget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_real_steps_fit_the_budget_and_with_any_block_fewer_they_do_not(name):
    model = MODELS[name]()
    inputs = inputs_for(model, batch=16)
    decided = decide(model, inputs)
    least, none = least_and_most(decided, model, inputs)
    blocks, counts = blocks_of(none, repeated_blocks(model)), []
    for share in BUDGETS:
        budget = int(least.peak_bytes + share * (none.peak_bytes - least.peak_bytes))
        decided = decide(model, inputs)
        found = fit_in(decided, model, inputs, optimizer="sgd", memory=budget)
        chosen = list(decided.checkpointed)
        counts.append(len(chosen))
        with decided.applied(model):
            peak, _ = counted_peak(model, inputs, "sgd")
        assert peak == found.after.peak_bytes == decided.report.peak_bytes <= budget
        foreseen = foreseen_peak(none, [block for block in blocks if block.path in chosen])
        assert foreseen == pytest.approx(peak, rel=0.02)
        for path in chosen:
            decided.checkpointed[:] = [other for other in chosen if other != path]
            with decided.applied(model):
                assert counted_peak(model, inputs, "sgd")[0] > budget
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_where_nothing_need_be_checkpointed_nothing_is():
    model = gpt2()
    report = invact.fit(model, inputs_for(model), memory="1GiB", optimizer="sgd")
    assert report.checkpointed == []
    assert report.inverted
    assert "nothing checkpointed; it fits as it is, too" in str(report)


def test_report_says_what_is_checkpointed_and_the_peak():
    model = vit(layers=4)
    inputs = inputs_for(model, 16)
    budget = budget_for(model, inputs)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd")
    assert report.checkpointed == ["blocks.0", "blocks.1"]
    assert report.peak_bytes <= report.memory_bytes == budget < report.peak_bytes_before
    assert sum(report.peak.values()) == report.peak_bytes
    assert all(block.bytes_won > 0 and 0 < block.share < 0.5 for block in report.blocks)
    kept = inputs[0].nbytes + counted_peak(model, inputs, "sgd")[1]
    assert report.bytes_after == pytest.approx(kept, abs=8)  # the sum that stands for a loss
    assert "2 blocks checkpointed" in str(report)
    assert report.to_dict()["checkpointed"] == report.checkpointed


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_the_optimizers_step_counts_against_the_budget(optimizer):
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    budget = budget_for(model, inputs, optimizer=optimizer)
    report = invact.fit(model, inputs, memory=budget, optimizer=optimizer)
    assert report.checkpointed
    assert counted_peak(model, inputs, optimizer)[0] == report.peak_bytes <= budget


def test_an_optimizer_of_the_users_is_asked_what_it_holds():
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    own = torch.optim.AdamW(model.parameters(), amsgrad=True)
    report = invact.fit(model, inputs, memory="1GiB", optimizer=own)
    assert report.optimizer == "AdamW"
    assert not own.state
    assert counted_peak(model, inputs, own)[0] == report.peak_bytes


def test_gradients_that_are_summed_over_batches_count_against_the_budget():
    model = gpt2(layers=3)
    inputs = inputs_for(model, 8)
    budget = budget_for(model, inputs, 0.4)
    alone = len(invact.fit(model, inputs, memory=budget, optimizer="sgd").blocks)
    invact.unpatch(model)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", accumulating=True)
    assert len(report.blocks) >= alone
    assert counted_peak(model, inputs, "sgd", accumulating=True)[0] == report.peak_bytes <= budget


def test_under_autocast():
    model = vit(layers=3)
    inputs = inputs_for(model, 16)
    budget = budget_for(model, inputs, autocast=torch.bfloat16)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", autocast=torch.bfloat16)
    assert counted_peak(model, inputs, "sgd", autocast=torch.bfloat16)[0] == report.peak_bytes <= budget


# --- gradients ----------------------------------------------------------------------------------------


def gradients(model, inputs):
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(model, inputs)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters())]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_stocks_bit_for_bit_with_exact(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    stock = gradients(model, inputs)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs, exact=True), optimizer="sgd", exact=True)
    assert 0 < len(report.blocks) < 4
    assert all(map(torch.equal, gradients(model, inputs), stock))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_stocks_but_for_rounding(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    stock = gradients(model, inputs)
    assert invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd").blocks
    for ours, theirs in zip(gradients(model, inputs), stock, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


def fitted(name):
    model = MODELS[name]()
    inputs = inputs_for(model, 16)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs, exact=True), optimizer="sgd", exact=True)
    assert report.blocks
    return model, inputs


# --- other ways of use --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2 with dropout", "llama", "vit with dropout"])
def test_unpatch_takes_it_all_back(name):
    model = MODELS[name]()
    inputs, before = inputs_for(model, 16), described(model)
    classes = [type(module) for module in model.modules()]
    assert invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd").blocks
    assert [type(module) for module in model.modules()] != classes
    invact.unpatch(model)
    assert described(model) == before
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_models_are_saved_copied_and_loaded_as_ever(name):
    model, inputs = fitted(name)
    stock = MODELS[name]()
    stock.load_state_dict(model.state_dict())
    expected = gradients(stock, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, gradients(other, inputs), expected))
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("name", ["gpt2 with dropout", "llama", "vit with dropout"])
def test_results_in_eval_mode_are_stocks(name):
    model, inputs = fitted(name)
    stock = MODELS[name]()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = (loss_of_eval(each, inputs) for each in (model, stock))
    assert torch.equal(ours, theirs)


def loss_of_eval(model, inputs):
    model.eval()
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return getattr(output, "logits", output)


def test_a_model_that_keeps_a_cache_gives_and_generates_as_stock_does():
    """In training what runs twice would write to a cache twice, so the model leaves it out; in eval it stays."""
    model = llama(layers=4, use_cache=True)
    inputs = inputs_for(model, 16)
    stock = copy.deepcopy(model)
    expected = gradients(stock, inputs)
    budget = budget_for(model, inputs, exact=True)
    assert invact.fit(model, inputs, memory=budget, optimizer="sgd", exact=True).blocks
    assert all(map(torch.equal, gradients(model, inputs), expected))
    assert vars(model.model).get("gradient_checkpointing") is vars(stock.model).get("gradient_checkpointing")
    prompt = inputs["input_ids"][:2, :8]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ours, theirs = (each.eval().generate(prompt, **options) for each in (model, stock))
    assert torch.equal(ours, theirs)
    assert model(prompt).past_key_values is not None


def test_what_a_user_checkpoints_stays_so_and_is_not_chosen():
    model = gpt2(dropout=0, layers=4)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.transformer.h[1:]:
        layer.gradient_checkpointing = False
    inputs = inputs_for(model, 16)
    expected = gradients(model, inputs)
    budget = budget_for(model, inputs, exact=True)
    report = invact.fit(model, inputs, memory=budget, optimizer="sgd", exact=True)
    assert report.blocks
    assert "transformer.h.0" not in report.checkpointed
    assert counted_peak(copy.deepcopy(model), inputs, "sgd")[0] == report.peak_bytes
    assert all(map(torch.equal, gradients(model, inputs), expected))
    invact.unpatch(model)
    assert [layer.gradient_checkpointing for layer in model.transformer.h] == [True, False, False, False]


def test_a_plain_models_blocks_are_found_by_their_container():
    model = sequential(4)
    inputs = inputs_for(model, 16)
    report = invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd")
    assert report.checkpointed
    assert set(report.checkpointed) < {"0", "1", "2", "3"}
    assert counted_peak(model, inputs, "sgd")[0] == report.peak_bytes


def test_blocks_with_batch_norm_have_stocks_gradients_and_running_statistics():
    """With PyTorch's checkpointing alone they are counted once more when the block runs once more."""

    def block():
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    model, inputs = nn.Sequential(*(block() for _ in range(4))).train(), (torch.randn(4, 8, 16, 16),)
    stock = copy.deepcopy(model)
    expected = gradients(stock, inputs)
    budget = budget_for(model, inputs, 0.9, exact=True)
    assert invact.fit(model, inputs, memory=1 << 20, optimizer="sgd", exact=True).peak_bytes < 1 << 20
    invact.unpatch(model)
    decided = decide(model, inputs, exact=True)
    fit_in(decided, model, inputs, optimizer="sgd", memory=budget)
    assert decided.checkpointed
    with decided.applied(model):
        assert all(map(torch.equal, gradients(model, inputs), expected))
    assert all(map(torch.equal, model.buffers(), stock.buffers()))


@pytest.mark.parametrize("library", ["torchvision", "timm", "open_clip"])
def test_vision_models_of_other_builds_fit(library):
    if library == "torchvision":
        from torchvision.models.swin_transformer import SwinTransformer

        model = SwinTransformer([4, 4], 24, [1, 3, 1], [2, 2, 2], [4, 4], num_classes=4)
        inputs = (torch.randn(4, 3, 64, 64),)
    elif library == "timm":
        import timm

        model = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(1, 3, 1),
            num_heads=(2, 2, 2), num_classes=4,
        )  # fmt: skip
        inputs = (torch.randn(4, 3, 64, 64),)
    else:
        open_clip = pytest.importorskip("open_clip")

        model = open_clip.transformer.VisionTransformer(64, 16, 64, 4, 2, 4.0, output_dim=16)
        inputs = (torch.randn(8, 3, 64, 64),)
    model.train()
    report = invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd")
    assert report.checkpointed
    assert counted_peak(model, inputs, "sgd")[0] == report.peak_bytes <= report.memory_bytes


# --- what does not go ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"memory": "10"}, ValueError, "'10' has no unit. Write it as 10GiB or 10GB."),
        ({"memory": 0}, ValueError, "0 is less than any GPU has"),
        ({"memory": -1}, ValueError, "-1 is less than any GPU has"),
        ({"memory": "24 apples"}, ValueError, "'24 apples' is no amount of memory. Write it as 24GiB."),
        ({"memory": 2.5}, TypeError, "memory is of type float"),
        ({"memory": True}, TypeError, "memory is of type bool"),
        ({"optimizer": "lion"}, ValueError, "There is no optimizer 'lion' here. Pass one of adamw,"),
        ({"optimizer": torch.optim.AdamW}, TypeError, "optimizer is of type type, but must be a name"),
        ({"optimizer": None}, TypeError, "optimizer is of type NoneType, but must be a name"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_and_changes_nothing(options, error, words):
    model = sequential()
    before = described(model)
    with pytest.raises(error) as refused:
        invact.fit(model, inputs_for(model), **{"memory": "1GiB", **options})
    assert words in str(refused.value)
    assert described(model) == before


def test_a_budget_below_the_weights_says_what_else_to_train():
    model = gpt2(dropout=0)
    inputs, before = inputs_for(model), described(model)
    with pytest.raises(DoesNotFitError, match=r"with all of its 2 blocks checkpointed.*Train fewer parameters"):
        invact.fit(model, inputs, memory="1MiB")
    assert described(model) == before


def test_a_batch_that_is_too_large_says_which_would_fit_and_that_does():
    model = gpt2(dropout=0)
    inputs, before = inputs_for(model, 32), described(model)
    with pytest.raises(
        DoesNotFitError, match=r"By these figures a batch of about [0-9]+ instead of 32 would fit"
    ) as refused:
        invact.fit(model, inputs, memory="10MiB", optimizer="sgd")
    assert described(model) == before
    batch = int(str(refused.value).split("a batch of about ")[1].split()[0])
    assert invact.fit(model, inputs_for(model, batch), memory="10MiB", optimizer="sgd").peak_bytes <= 10 << 20


def test_a_model_without_blocks_has_none_to_checkpoint():
    model = nn.Sequential(nn.Linear(64, 2048), nn.GELU(), nn.Linear(2048, 64))
    with pytest.raises(DoesNotFitError, match="it has no blocks that could be checkpointed"):
        invact.fit(model, (torch.randn(4096, 64),), memory="8MiB", optimizer="sgd")
    assert type(model[1]) is nn.GELU


def test_where_the_optimizers_step_does_not_fit_no_smaller_batch_is_promised():
    model = sequential(4)
    inputs = inputs_for(model, 2)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    with pytest.raises(DoesNotFitError, match="whatever the batch") as refused:
        invact.fit(model, inputs, memory=3 * parameters, optimizer="adamw")
    assert "a batch of about" not in str(refused.value)


def test_a_model_that_was_given_no_labels_says_that_its_loss_is_not_counted():
    model = gpt2()
    ids = torch.zeros(2, 16, dtype=torch.long)
    assert any("no labels" in note for note in invact.fit(model, {"input_ids": ids}, memory="1TiB").notes)
    invact.unpatch(model)
    labelled = invact.fit(model, {"input_ids": ids, "labels": ids}, memory="1TiB")
    assert not any("no labels" in note for note in labelled.notes)


class Changing(nn.Module):
    """A block that changes in place what it was given, or what it reads."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.what == "argument":
            x += 1
        if self.what == "buffer":
            self.calls += 1
        return self.down(nn.functional.gelu(self.up(x))) * (1 + self.calls)


class Blocks(nn.Module):
    def __init__(self, what: str, by_keyword: bool) -> None:
        super().__init__()
        self.first, self.by_keyword = nn.Linear(64, 64), by_keyword
        self.blocks = nn.ModuleList(Changing(what) for _ in range(4))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x=x) if self.by_keyword else block(x)
        return x


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("what", ["argument", "buffer"])
def test_a_block_that_would_not_find_what_it_was_given_again_is_not_checkpointed(what, by_keyword):
    model, inputs = Blocks(what, by_keyword), (torch.randn(512, 64),)
    with pytest.raises(DoesNotFitError, match="no blocks that could be checkpointed"):
        invact.fit(model, inputs, memory="3MiB", optimizer="sgd")


def test_an_argument_by_keyword_that_is_changed_after_all_is_an_error_and_no_wrong_gradient():
    model, x = Blocks("nothing", by_keyword=True), torch.randn(512, 64)
    invact.fit(model, (x,), memory="3.5MiB", optimizer="sgd")
    loss = model(x).sum()
    model.blocks[0].register_forward_pre_hook(lambda *_: None)

    def change(block, args, kwargs, output):
        with torch.no_grad():
            kwargs["x"].add_(1)

    model.blocks[0].register_forward_hook(change, with_kwargs=True)
    loss = model(x).sum()
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_without_gradients_a_fitted_layer_keeps_its_cache():
    model = gpt2(dropout=0, layers=3)
    inputs = inputs_for(model, 8)
    ids = inputs["input_ids"][:1, :8]
    with torch.no_grad():
        before = model(ids, use_cache=True)
    invact.fit(model, inputs, memory=budget_for(model, inputs), optimizer="sgd")
    with torch.no_grad():
        after = model(ids, use_cache=True)
    assert after.past_key_values.get_seq_length() == before.past_key_values.get_seq_length() == 8
    assert torch.equal(after.logits, before.logits)
