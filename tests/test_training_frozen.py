"""Patched models of which parts are frozen, locked or run without gradients."""

import copy

import pytest
import torch
from torch import nn
from training_alike import Stack, assert_same_gradients, gradients, rows, stock_and_patched, train_once

import invact

# --- adapters and wrappers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("patch_first", [False, True], ids=["adapted, then patched", "patched, then adapted"])
def test_lora_on_frozen_layers(dropout, patch_first, count_kept):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    x = rows()
    lora = LoraConfig(target_modules=["up", "down", "up2", "down2"], lora_dropout=dropout, r=4, init_lora_weights=False)
    base = Stack()
    torch.manual_seed(1)
    stock = get_peft_model(copy.deepcopy(base), lora)
    kept = count_kept(stock, (x,))
    if patch_first:
        assert len(invact.patch(base, (x,)).inverted) == 4
    torch.manual_seed(1)
    model = get_peft_model(base, lora)
    if not patch_first:
        report = invact.patch(model, (x,))
        assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (x,)))
        assert report.bytes_after <= report.bytes_before
        assert len(report.inverted) == (4 if dropout == 0.0 else 0)
    for each in (stock, model):
        torch.manual_seed(0)
        train_once(each, x)
    assert_same_gradients(model, stock)
    assert all("lora" in name for name in gradients(model))


# --- other devices and dtypes, locked and frozen parts ------------------------------------------------


def test_a_tower_under_no_grad_is_left_alone_and_the_other_is_patched(count_kept):
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = Stack(), Stack()

        def forward(self, x):
            with torch.no_grad():
                locked = self.image(x)
            return locked @ self.text(x).T

    x = rows()
    stock, patched, report = stock_and_patched(TwoTowers(), x)
    assert all(site.path.startswith("text.") for site in report.inverted)
    assert {s.reason for s in report.sites if s.path.startswith("image.")} == {"no gradient flows through it here"}
    for model in (stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)
    assert report.bytes_after == count_kept(patched, (x,))


def test_a_locked_open_clip_image_tower_is_left_alone(count_kept):
    import open_clip

    model = open_clip.model.CLIP(
        32, {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2},
    )  # fmt: skip
    inputs = {"image": torch.randn(2, 3, 16, 16), "text": torch.randint(1, 20, (2, 8))}
    for unlocked, sites in ((0, 2), (2, 3)):
        locked = copy.deepcopy(model)
        locked.lock_image_tower(unlocked_groups=unlocked)
        stock = copy.deepcopy(locked)
        report = invact.patch(locked, inputs)
        assert len(report.inverted) == sites
        assert (report.bytes_before, report.bytes_after) == (count_kept(stock, inputs), count_kept(locked, inputs))
        for each in (stock, locked):
            image, text, scale = each(**inputs)
            (scale * image @ text.T).square().mean().backward()
        assert_same_gradients(locked, stock)


def test_layers_frozen_after_planning_still_get_right_gradients_elsewhere():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        model.embed.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        model.blocks[1].down.requires_grad_(False)
        train_once(model, x)
    assert_same_gradients(patched, stock)


def test_frozen_layers_decide_site_by_site(count_kept):
    model, x = Stack(), rows()
    model.blocks[0].requires_grad_(False)  # nobody keeps what its activations give
    model.blocks[1].down2.requires_grad_(False)
    report = invact.patch(model, (x,))
    assert [site.path for site in report.inverted] == ["blocks.1.act"]
    assert report.bytes_after == count_kept(model, (x,))
