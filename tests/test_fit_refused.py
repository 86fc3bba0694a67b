"""What `invact.fit` can not do is refused in a sentence, or left alone."""

from __future__ import annotations

import pytest
import torch
from described import described
from fitted_models import budget_for
from small_trained import gpt2, inputs_for, sequential
from torch import nn

import invact
from invact.fitting.choosing import DoesNotFitError

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


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
