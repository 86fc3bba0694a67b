"""Which blocks of a model may be checkpointed one by one."""

from __future__ import annotations

import pytest
import timm
import torch
from small_trained import bert, gpt2, llama, lora_llama, t5, vit
from torch import nn

import invact
from invact.fitting.blocks import FEW, repeated_blocks


def resnet18():
    return timm.create_model("resnet18", num_classes=8)


def block(width=8):
    return nn.Sequential(nn.Linear(width, width), nn.GELU())


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (gpt2, ["transformer.h.0", "transformer.h.1"]),
        (llama, ["model.layers.0", "model.layers.1"]),
        (bert, ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        (t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        (lora_llama, ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]),
        (vit, ["blocks.0", "blocks.1"]),
        (resnet18, [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]),
    ],
)
def test_known_models_have_the_blocks_that_one_expects(make, paths):
    assert repeated_blocks(make()) == paths


def test_stages_are_not_blocks_but_hold_them():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 3), num_heads=(2, 2)
    )
    blocks_of_stages = [f"layers.0.blocks.{n}" for n in range(2)] + [f"layers.1.blocks.{n}" for n in range(3)]
    assert repeated_blocks(model) == blocks_of_stages


def test_many_blocks_that_hold_blocks_of_their_own_are_blocks():
    deep = nn.Sequential(*(nn.Sequential(block(), block()) for _ in range(FEW)))
    assert repeated_blocks(deep) == [str(number) for number in range(FEW)]
    assert repeated_blocks(deep[:2]) == ["0.0", "0.1", "1.0", "1.1"]


def test_layers_alone_and_what_stands_in_no_container_are_no_blocks():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = block(), block()

    assert repeated_blocks(Pair()) == []
    assert repeated_blocks(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) == []
    assert repeated_blocks(nn.Sequential(nn.ModuleList([nn.Linear(8, 8)]), nn.ModuleList([nn.Linear(8, 8)]))) == []
    assert repeated_blocks(nn.Linear(8, 8)) == []


def test_what_is_checkpointed_already_is_left_out():
    model = gpt2()
    model.transformer.h[0].gradient_checkpointing = True
    assert repeated_blocks(model) == ["transformer.h.1"]


def test_a_patched_model_has_the_same_blocks():
    model = nn.Sequential(block(64), block(64))
    invact.patch(model, (torch.randn(64, 64),))
    assert repeated_blocks(model) == ["0", "1"]
