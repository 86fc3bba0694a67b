"""What a loss keeps: logits in 16 bits, from which its log-probabilities are made again, and no more at the turn."""

import json

import pytest
import torch
import torch.nn.functional as F
from small_models import small_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

import invact
from invact import patchers
from invact.cli import app
from invact.ledger.ledger import Ledger
from invact.pytorch.version_check import RELEASE
from invact.report.amounts import format_bytes

VOCABULARY, BATCH, LENGTH = 1000, 4, 32
LOGITS = BATCH * LENGTH * VOCABULARY


class Head(nn.Module):
    """Embeddings and a language model's head, with a loss in its forward."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.loss = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY), loss

    def forward(self, ids):
        return self.loss(self.head(self.embedding(ids)), ids)


def ids():
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def flat(logits, labels):
    return logits.view(-1, VOCABULARY), labels.view(-1)


def as_causal(logits, labels):
    return F.cross_entropy(*flat(logits.float(), labels), ignore_index=5)


def as_a_module(logits, labels):
    return nn.CrossEntropyLoss()(*flat(logits.float(), labels))


def shifted_wide(logits, labels):
    logits = logits.float()
    return F.cross_entropy(*flat(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous()))


def shifted_narrow(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1))


def smoothed(logits, labels):
    return F.cross_entropy(*flat(logits.float(), labels), label_smoothing=0.1)


def weighted(logits, labels):
    return F.cross_entropy(*flat(logits.float(), labels), weight=torch.linspace(0.1, 1, VOCABULARY))


def classes_second(logits, labels):
    return F.cross_entropy(logits.float().transpose(1, 2), labels)


def with_z_loss(logits, labels):
    logits = logits.float()
    return F.cross_entropy(*flat(logits, labels)) + 1e-2 * torch.logsumexp(logits, -1).pow(2).mean()


def with_entropy(logits, labels):
    log_p = F.log_softmax(logits.float(), -1)
    return F.nll_loss(*flat(log_p, labels)) + 1e-2 * (log_p.exp() * log_p).sum(-1).mean()


def written_out(logits, labels):
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    return -log_p.gather(-1, labels[..., None]).mean() - 0.1 * log_p.mean()


def capped(logits, labels):
    return F.cross_entropy(*flat((torch.tanh(logits / 30) * 30).float(), labels))


LOSSES = [
    as_causal,
    as_a_module,
    shifted_wide,
    shifted_narrow,
    smoothed,
    weighted,
    classes_second,
    with_z_loss,
    with_entropy,
    written_out,
    capped,
]


def step(model, tokens, autocast=None):
    """What one step keeps, its loss, and its gradients."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None), Ledger(model) as ledger:
        loss = model(tokens)
    nbytes = ledger.memory().total_bytes
    model.zero_grad()
    loss.backward()
    return nbytes, loss.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("autocast", [False, True], ids=["16 bits", "autocast"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_of_a_loss_the_logits_remain_in_16_bits(loss, autocast):
    if loss.__name__ == "capped" and RELEASE < (2, 9):
        pytest.skip("with PyTorch 2.8 a capped loss keeps its 32 bits, as stock does; why is not known yet")
    model, tokens = Head(loss), ids()
    model = model if autocast else model.bfloat16()
    dtype = torch.bfloat16 if autocast else None
    before, stock_loss, stock = step(model, tokens, dtype)
    with invact.patched(model, (tokens,), autocast=dtype, exact=True) as report:
        after, ours_loss, ours = step(model, tokens, dtype)
    assert before > 3.9 * LOGITS
    assert after < 2.2 * LOGITS
    assert after == pytest.approx(report.bytes_after, rel=0.01)
    assert report.bytes_before - report.bytes_after == sum(tensor.bytes_saved for tensor in report.derived)
    assert report.bytes_after <= 1.05 * report.bytes_floor
    assert torch.equal(ours_loss, stock_loss)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_of_logits_in_32_bits_no_more_is_kept_than_by_stock(loss):
    model, tokens = Head(loss), ids()
    before, _, stock = step(model, tokens)
    with invact.patched(model, (tokens,), exact=True):
        after, _, ours = step(model, tokens)
    assert after <= before
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


class Live(TorchDispatchMode):
    """The most bytes alive at once of all that was made inside."""

    def __init__(self):
        super().__init__()
        self.most, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self._alive[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self._alive = {key: found for key, found in self._alive.items() if not found[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def test_the_logits_go_before_the_gradient_of_them_comes():
    model, tokens = Head(as_causal).bfloat16(), ids()

    def most():
        with Live() as live:
            model(tokens).backward()
        model.zero_grad()
        return live.most

    before = most()
    assert before > 12 * LOGITS
    with invact.patched(model, (tokens,)):
        assert most() <= before + 0.2 * LOGITS


def test_a_graph_with_a_loss_can_be_run_again():
    model, tokens = Head(as_causal).bfloat16(), ids()
    weights = [*model.parameters()]
    stock = torch.autograd.grad(model(tokens), weights)
    with invact.patched(model, (tokens,)):
        loss = model(tokens)
        for again in (True, True, False):
            found = torch.autograd.grad(loss, weights, retain_graph=again)
            assert all(torch.equal(a, b) for a, b in zip(found, stock, strict=True))
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(loss, weights)


class ReadsTwice(torch.autograd.Function):
    """Of a user's, which asks for what it kept as often as it likes."""

    @staticmethod
    def forward(ctx, log_p):
        ctx.save_for_backward(log_p)
        return log_p.exp()

    @staticmethod
    def backward(ctx, dy):
        (first,), (second,) = ctx.saved_tensors, ctx.saved_tensors
        return dy * (first.exp() + second.exp()) / 2


def test_who_asks_twice_for_log_probabilities_gets_them_twice():
    def loss(logits, labels):
        return ReadsTwice.apply(F.log_softmax(logits.float(), -1)).square().mean()

    model, tokens = Head(loss).bfloat16(), ids()
    _, _, stock = step(model, tokens)
    with invact.patched(model, (tokens,)) as report:
        _, _, ours = step(model, tokens)
    assert report.derived
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_logits_may_be_changed_between_forward_and_backward():
    class WithLogits(Head):
        def forward(self, ids):
            logits = self.head(self.embedding(ids))
            return self.loss(logits, ids), logits

    model, tokens = WithLogits(as_causal).bfloat16(), ids()

    def gradients():
        loss, logits = model(tokens)
        with torch.no_grad():
            logits /= 2  # as for a measure of what it predicts
        return torch.autograd.grad(loss, [*model.parameters()])

    stock = gradients()
    with invact.patched(model, (tokens,)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), stock, strict=True))


# --- a model's own loss, in the report ------------------------------------------------------------------


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 1024, "vocab_size": 2000}
    return small_model("GPT2LMHeadModel", **sizes, bos_token_id=0, eos_token_id=0)


ONE_LAYER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama():
    return small_model("LlamaForCausalLM", **ONE_LAYER, num_key_value_heads=1, vocab_size=2000, use_cache=True)


def bert():
    return small_model("BertForMaskedLM", **ONE_LAYER, vocab_size=2000)


def t5():
    sizes = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 2000}
    return small_model("T5ForConditionalGeneration", **sizes)


def step_of_transformers(model, inputs, autocast):
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Ledger(model) as ledger:
        loss = model(**inputs).loss
    nbytes = ledger.memory().total_bytes
    model.zero_grad()
    loss.backward()
    return nbytes, [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("autocast", [False, True], ids=["16 bits", "autocast"])
@pytest.mark.parametrize("build", [gpt2, llama, bert, t5], ids=lambda build: build.__name__)
def test_a_language_model_with_its_loss_keeps_what_is_said_and_gets_stocks_gradients(build, autocast):
    torch.manual_seed(0)
    model = build().train()
    model = model if autocast else model.bfloat16()
    inputs = patchers.example_inputs(model, 4, 64)
    stock = step_of_transformers(model, inputs, autocast)
    with invact.patched(model, inputs, autocast=torch.bfloat16 if autocast else None, exact=True) as report:
        ours = step_of_transformers(model, inputs, autocast)
    assert (stock[0], ours[0]) == pytest.approx((report.bytes_before, report.bytes_after), rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], stock[1], strict=True))
    logits = 4 * 64 * 2000
    wide = 4 if autocast or build in (gpt2, llama) else 2
    assert report.loss_bytes_before == pytest.approx(wide * logits, rel=0.03)
    assert report.loss_bytes == pytest.approx(2 * logits, rel=0.03)
    (note,) = [note for note in report.notes if "the loss keeps" in note]
    assert format_bytes(report.loss_bytes) in note
    assert "256 tokens for 2,000 entries" in note


def test_without_labels_nothing_is_said_of_a_loss():
    model = gpt2().train()
    report = invact.plan(model, patchers.example_inputs(model, 4, 64, loss=False))
    assert (report.loss_bytes_before, report.loss_bytes) == (0, 0)
    assert "without a loss" in report.setting
    assert not any("the loss" in note for note in report.notes)


def test_a_dry_run_leaves_the_loss_out_on_demand(tmp_path):
    config = gpt2().config
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    sizes = ["--batch-size", "2", "--seq-len", "32", "--json"]
    counted, left_out = (
        json.loads(CliRunner().invoke(app, ["patch", str(tmp_path), *sizes, *option]).stdout)
        for option in ([], ["--no-loss"])
    )
    assert counted["loss_bytes"] == pytest.approx(2 * 2 * 32 * 2000, rel=0.05)
    assert left_out["loss_bytes"] == 0
    assert counted["bytes_before"] - left_out["bytes_before"] == pytest.approx(counted["loss_bytes_before"], rel=0.05)
