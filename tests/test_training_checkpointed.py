"""Patched models under gradient checkpointing: stock's gradients, and fewer bytes while a region runs anew."""

import copy
from functools import partial

import pytest
import torch
from small_models import small_model
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from training_alike import (
    FREED,
    HIDDEN,
    WIDTH,
    Stack,
    assert_same_gradients,
    loss_of,
    rows,
    stock_and_patched,
    train_once,
)

import invact


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
    ids = {"input_ids": torch.randint(0, 50, (2, 16))}
    model = small_model("GPT2LMHeadModel", n_embd=32, n_head=2, vocab_size=50, n_positions=16, use_cache=False).train()
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
