"""Patched models in the loops people train in: the gradients are the stock ones, and what was saved stays saved."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import invact
from invact.swapping import Inverted

WIDTH, HIDDEN, ROWS = 16, 64, 8
# Bytes that inverting one call frees in fp32: the input, less one bit per element.
FREED = ROWS * HIDDEN * 4 - ROWS * HIDDEN // 8


class Feed(nn.Module):
    """One activation that is a module and one that is an expression, both between linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.up2, self.down2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        x = x + self.down(self.act(self.up(x)))
        return x + self.down2(F.silu(self.up2(self.norm(x))))


class Stack(nn.Module):
    """Two blocks, each under gradient checkpointing if `reentrant` is not None."""

    def __init__(self, blocks=2, reentrant=None):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Feed() for _ in range(blocks))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def rows(n=ROWS):
    return torch.randn(n, WIDTH)


def stock_and_patched(model, x, sites=4, **options):
    """A copy of the model as it was, and the model patched."""
    stock = copy.deepcopy(model)
    report = invact.patch(model, (x,), **options)
    assert len(report.inverted) == sites
    return stock, model, report


def loss_of(output):
    return output.float().square().mean() + output.float().sin().mean()


def train_once(model, x):
    loss_of(model(x)).backward()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(patched, stock, tolerance=1e-5):
    ours, theirs = gradients(patched), gradients(stock)
    assert list(ours) == list(theirs)
    assert ours
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-7, name


# --- mixed precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["without scaler", "with scaler"])
def test_under_autocast_the_gradients_are_the_stock_ones_to_bf16_and_the_bytes_as_reported(scaled, count_kept):
    x = rows()
    stock, patched, report = stock_and_patched(Stack(), x, autocast=torch.bfloat16)
    exact = copy.deepcopy(stock)
    train_once(exact, x)
    for model in (stock, patched):
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(x))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not scaled or scaler.get_scale() == 2.0**12  # no gradient overflowed

    def error(model):
        vectors = [torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, exact)]
        return (vectors[0] - vectors[1]).norm() / vectors[1].norm()

    assert error(patched) < 1.25 * error(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, kept_by_stock = count_kept(patched, (x,)), count_kept(stock, (x,))
    # not to the byte: LayerNorm's two statistics per row are fp32 on a real CPU and bf16 on fake tensors
    assert kept == pytest.approx(report.bytes_after + report.weight_cast_bytes, rel=0.01)
    assert kept_by_stock == pytest.approx(report.bytes_before + report.weight_cast_bytes, rel=0.01)
    assert report.bytes_before - report.bytes_after == sum(site.bytes_saved for site in report.inverted)


def test_fp16_autocast_with_a_scaler_skips_the_same_steps_as_stock():
    x = 30 * rows()
    stock, patched, _ = stock_and_patched(Stack(), x, autocast=torch.float16)
    scales = []
    for model in (stock, patched):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        history = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model(x))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
        scales.append(history)
    assert scales[0][0] < 2.0**24  # it did overflow
    assert scales[0] == scales[1]
    assert all(torch.isfinite(p).all() for p in patched.parameters())


# --- gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointed_blocks_get_the_stock_gradients_and_hold_nothing_between(reentrant, count_kept):
    x = rows()
    stock, patched, report = stock_and_patched(Stack(reentrant=reentrant), x)
    plain = copy.deepcopy(stock)
    plain.reentrant = None
    for model in (plain, stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)
    assert_same_gradients(patched, plain)
    assert report.bytes_before == report.bytes_after == count_kept(stock, (x,)) == count_kept(patched, (x,))


def test_recomputing_a_checkpointed_block_keeps_less():
    x = rows()
    stock, patched, report = stock_and_patched(Stack(blocks=1, reentrant=True), x, sites=2)

    def kept_in_backward(model):
        loss, held = loss_of(model(x)), []

        def pack(tensor):
            held.append(tensor.detach())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(nbytes for address, nbytes in storages.items() if address not in weights)

    freed = kept_in_backward(stock) - kept_in_backward(patched)
    assert freed == 2 * FREED == sum(site.bytes_saved for site in report.inverted)


def test_an_activation_checkpointed_by_itself_gets_the_stock_gradient():
    class OnlyTheActivation(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
            self.reentrant = reentrant

        def forward(self, x):
            return self.down(checkpoint(self.act, self.up(x), use_reentrant=self.reentrant))

    for reentrant in (True, False):
        model, x = OnlyTheActivation(reentrant), rows()
        stock = copy.deepcopy(model)
        report = invact.patch(model, (x,))
        assert report.bytes_after <= report.bytes_before
        for each in (stock, model):
            train_once(each, x)
        assert_same_gradients(model, stock)


@pytest.mark.parametrize("patch_first", [False, True], ids=["enabled, then patched", "patched, then enabled"])
def test_hugging_face_checkpointing_enabled_before_or_after_patching(patch_first):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, use_cache=False)
    ids = {"input_ids": torch.randint(0, 50, (2, 16))}
    model = GPT2LMHeadModel(config).train()
    stock = copy.deepcopy(model)
    for reentrant in (True, False):
        enable = partial(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
        if patch_first:
            report = invact.patch(model, ids)
            enable()
        else:
            enable()
            report = invact.patch(model, ids)
        assert len(report.inverted) == 2
        for each in (stock, model):
            each.zero_grad()
            torch.manual_seed(0)
            loss_of(each(**ids).logits).backward()
        assert_same_gradients(model, stock)
        invact.unpatch(model)
        model.gradient_checkpointing_disable()


def test_selective_checkpointing_may_save_the_output_of_the_activation():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def keep_products(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Stack):
        def forward(self, x):
            contexts = partial(create_selective_checkpoint_contexts, keep_products)
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return self.head(x)

    x = rows()
    stock, patched, _ = stock_and_patched(Selective(), x)
    for model in (stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)
