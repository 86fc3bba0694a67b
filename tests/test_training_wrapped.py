"""Patched models in adapters and wrappers, copied, saved, loaded, exported and traced."""

import copy
import io

import pytest
import torch
from training_alike import (
    OneExpression,
    Stack,
    assert_same_gradients,
    kept_by_call,
    loss_of,
    rows,
    stock_and_patched,
    train_once,
)

import invact

# --- adapters and wrappers ----------------------------------------------------------------------------


def test_merging_lora_into_a_patched_model():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    x, base = rows(), Stack()
    model = get_peft_model(base, LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False))
    invact.patch(model, (x,))
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert invact.unpatch(merged) == 2  # the sites before the adapted layers alone


@pytest.fixture
def accelerator_of():
    """Accelerators of other settings one after another: accelerate keeps those of the first for the process."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda precision: Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("patch_first", [False, True], ids=["prepared, then patched", "patched, then prepared"])
def test_accelerate_prepares_a_patched_model_and_a_prepared_one_is_patched(precision, patch_first, accelerator_of):
    x, accelerator = rows(), accelerator_of(precision)
    autocast = torch.bfloat16 if precision == "bf16" else None
    model = Stack()
    stock = copy.deepcopy(model)
    if patch_first:
        assert len(invact.patch(model, (x,), autocast=autocast).inverted) == 4
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    if not patch_first:
        assert len(invact.patch(prepared, (x,), autocast=autocast).inverted) == 4
    with accelerator.accumulate(prepared):
        accelerator.backward(loss_of(prepared(x)))
        accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
        optimizer.step()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        output = stock(x)
    loss_of(output).backward()
    assert_same_gradients(prepared, stock, tolerance=1e-5 if autocast is None else 2e-2)
    assert invact.unpatch(accelerator.unwrap_model(prepared)) == 4


def test_the_expression_of_a_forward_that_accelerate_wrapped_is_given_back_after_unwrapping(accelerator_of):
    model, x = OneExpression(), rows()
    stock = copy.deepcopy(model)
    train_once(stock, x)
    invact.patch(model, (x,), autocast=torch.bfloat16)
    accelerator = accelerator_of("bf16")
    prepared = accelerator.prepare(model)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert invact.unpatch(model) == 1
    kept, output = kept_by_call(lambda: model(x), model)
    loss_of(output).backward()
    assert torch.equal(model.up.weight.grad, stock.up.weight.grad)
    assert kept == kept_by_call(lambda: stock(x), stock)[0]


def test_unpatching_a_prepared_model_gives_back_the_expression_of_its_outermost_forward(accelerator_of):
    model, x = OneExpression(), rows()
    stock = copy.deepcopy(model)
    invact.patch(model, (x,))
    prepared = accelerator_of("bf16").prepare(model)
    assert invact.unpatch(prepared) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = kept_by_call(lambda: stock(x), stock)[0]
    assert kept_by_call(lambda: prepared(x), prepared)[0] == expected


# --- copies, files, graphs ----------------------------------------------------------------------------


def test_a_moving_average_copy_of_a_patched_model_averages_and_runs():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    averages = []
    for model in (stock, patched):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            train_once(model, x)
            optimizer.step()
            average.update_parameters(model)
        averages.append(average.eval())
    torch.testing.assert_close(averages[1](x), averages[0](x), rtol=1e-5, atol=1e-6)
    train_once(averages[1].train(), x)  # a copy that is trained must not send gradients to its model
    assert averages[1].module.embed.weight.grad is not None
    assert invact.unpatch(averages[1]) == 4
    assert invact.unpatch(patched) == 4


def test_state_dicts_go_both_ways_between_patched_and_stock():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    fresh = Stack()
    assert not any(fresh.load_state_dict(patched.state_dict()))
    torch.testing.assert_close(fresh(x), stock(x), rtol=0, atol=0)
    other = Stack()
    assert not any(patched.load_state_dict(other.state_dict()))
    for model in (patched, other):
        train_once(model, x)
    assert_same_gradients(patched, other)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_whole_model_saved_while_patched_loads_trains_and_can_be_patched_again():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    loaded = saved_and_loaded(patched)
    for model in (loaded, stock):
        train_once(model, x)
    assert_same_gradients(loaded, stock)
    invact.unpatch(loaded)
    assert len(invact.patch(loaded, (x,)).inverted) == 4
    assert patched.blocks[0].up.weight.grad is None


def test_exported_in_evaluation_mode_a_patched_model_is_the_stock_graph():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    graphs = [torch.export.export(model.eval(), (x,)) for model in (stock, patched)]
    targets = [[node.target for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert targets[0] == targets[1]
    assert torch.equal(graphs[1].module()(x), stock(x))


def test_traced_in_evaluation_mode_a_patched_model_computes_the_same():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    with torch.no_grad():
        traced = torch.jit.trace(patched.eval(), (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), stock.eval()(x))


def test_traced_in_training_mode_a_patched_model_is_the_stock_one():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    traced = torch.jit.trace(patched, (x,))
    traced(x).square().sum().backward()
    stock(x).square().sum().backward()
    for ours, own in zip(traced.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, own.grad)
