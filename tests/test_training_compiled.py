"""Patched models under torch.compile: one graph, stock's gradients, and the saving where there is one to be had."""

import copy

import pytest
import torch
from torch import nn
from training_alike import (
    FREED,
    HIDDEN,
    WIDTH,
    OneExpression,
    OneModule,
    assert_same_gradients,
    kept_by_call,
    loss_of,
    rows,
    stock_and_patched,
    train_once,
)

import invact

# Inductor's own choice of what to keep for backward, without the minutes that its C++ takes to compile.
PARTITIONED = "aot_eager_decomp_partition"


@pytest.mark.parametrize("kind", [OneModule, OneExpression])
@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled_in_one_graph_the_saving_remains_and_the_gradients_are_the_stock_ones(kind, backend):
    torch._dynamo.reset()
    x = rows()
    stock, patched, _ = stock_and_patched(kind(), x, sites=1)
    kept = []
    for model in (stock, patched):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        nbytes, output = kept_by_call(lambda compiled=compiled: compiled(x), model)
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(patched, stock)
    assert kept[0] - kept[1] == FREED


@pytest.mark.parametrize("kind", [OneModule, OneExpression])
@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile()", "torch.compile(model)"])
def test_a_model_compiled_before_can_be_patched_and_unpatched_and_follows(kind, in_place):
    torch._dynamo.reset()
    model, x = kind(), rows()
    stock = copy.deepcopy(model)
    train_once(stock, x)
    options = {"backend": "inductor", "fullgraph": True}
    compiled = model if in_place else torch.compile(model, **options)
    if in_place:
        model.compile(**options)
    stock_bytes, _ = kept_by_call(lambda: compiled(x), model)
    assert len(invact.patch(compiled, (x,)).inverted) == 1
    patched_bytes, output = kept_by_call(lambda: compiled(x), model)
    loss_of(output).backward()
    assert_same_gradients(model, stock)
    assert stock_bytes - patched_bytes == FREED
    assert invact.unpatch(compiled) == 1
    assert kept_by_call(lambda: compiled(x), model)[0] == stock_bytes


class WithGate(OneModule):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class WithNorm(OneModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.down(self.norm(self.act(self.up(x))))


@pytest.mark.parametrize("kind", [WithGate, WithNorm])
def test_where_the_compiler_recomputes_the_output_itself_patching_saves_nothing_and_costs_nothing(kind):
    """Stock compiled code keeps only x where the output goes to pointwise operations; then there is nothing to win."""
    torch._dynamo.reset()
    x = rows()
    stock, patched, report = stock_and_patched(kind(), x, sites=1)
    assert report.bytes_before - report.bytes_after == FREED  # in eager mode
    kept = []
    for model in (stock, patched):
        compiled = torch.compile(model, fullgraph=True, backend=PARTITIONED)
        nbytes, output = kept_by_call(lambda compiled=compiled: compiled(x), model)
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(patched, stock)
    assert kept[1] <= kept[0]


@pytest.mark.slow
def test_compiled_by_inductor_under_autocast_a_transformer_keeps_its_saving():
    from transformers import BertConfig, BertModel

    torch._dynamo.reset()
    config = BertConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, ids = BertModel(config, add_pooling_layer=False).train(), torch.randint(0, 50, (2, 16))
    stock = copy.deepcopy(model)
    report = invact.patch(model, {"input_ids": ids}, autocast=torch.bfloat16)
    kept = []
    for each in (stock, model):
        compiled = torch.compile(each, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nbytes, output = kept_by_call(
                lambda compiled=compiled: compiled(input_ids=ids).last_hidden_state.square(), each
            )
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(model, stock, tolerance=3e-2)
    assert kept[0] - kept[1] == sum(site.bytes_saved for site in report.inverted)
