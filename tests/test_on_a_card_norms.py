"""Fused norms on a card: one node each, gradients as near the truth as stock's, and what the allocator holds."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from norms_in_steps import as_if_fused, vary_weights_of_norms
from on_a_card import (
    DEVICE,
    NEEDS_A_CARD,
    Gated,
    assert_replays_to_stocks_gradients,
    assert_same_gradients,
    gradients,
    held_by_forward,
)
from small_models import small_model
from torch import Tensor, nn

import invact
from invact.pytorch.operators import has_fused_rms_norm

pytestmark = pytest.mark.gpu


def llama_with_norms(width: int) -> nn.Module:
    return small_model("LlamaModel", hidden_size=width, intermediate_size=2 * width, vocab_size=256)


def gemma_with_norms(width: int) -> nn.Module:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4, "vocab_size": 256}
    return small_model("GemmaModel", **sizes)


def t5_with_norms(width: int) -> nn.Module:
    sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 2 * width, "vocab_size": 256}
    return small_model("T5EncoderModel", **sizes, dropout_rate=0.0)


WITH_NORMS = pytest.mark.parametrize("make", [llama_with_norms, gemma_with_norms, t5_with_norms])
NORMS = 5  # of each


def with_norms(
    make: Callable[[int], nn.Module], width: int, batch: int, tokens: int
) -> tuple[nn.Module, dict[str, Tensor]]:
    """In bf16, its norms with weights of their own, and its inputs."""
    torch.manual_seed(0)
    model = make(width).to(DEVICE, torch.bfloat16).train()
    vary_weights_of_norms(model)
    return model, {"input_ids": torch.randint(1, 256, (batch, tokens), device=DEVICE)}


@pytest.fixture
def fused_here(monkeypatch) -> None:
    """On a CPU it is as if the fused operator were one kernel there: what runs is PyTorch's own composition of it."""
    if DEVICE.type == "cpu":
        as_if_fused(monkeypatch)
    elif not has_fused_rms_norm(DEVICE):
        pytest.skip("this PyTorch has no fused RMS norm for GPUs")


def fused_nodes(output: Tensor) -> int:
    """How many nodes of the output's graph are fused norms."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [function for function, _ in node.next_functions]
    return sum(node.name() == "FusedRmsNormBackward0" for node in seen)


@NEEDS_A_CARD
@WITH_NORMS
def test_every_norm_in_steps_is_one_node_of_the_graph(make, fused_here) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    assert len(invact.patch(model, inputs).fused) == NORMS
    assert fused_nodes(model(**inputs)[0]) == NORMS
    invact.unpatch(model)
    assert fused_nodes(model(**inputs)[0]) == 0


@WITH_NORMS
def test_nothing_is_fused_with_exact(make, fused_here) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    assert not invact.patch(model, inputs, exact=True).fused
    assert fused_nodes(model(**inputs)[0]) == 0


@WITH_NORMS
def test_gradients_through_fused_norms_are_as_near_to_float64s_as_stocks(make, fused_here, record_property) -> None:
    model, inputs = with_norms(make, 128, 4, 64)
    directions = torch.randn(4, 64, 128, device=DEVICE)

    def gradients_of(model: nn.Module) -> Tensor:
        model.zero_grad()
        (model(**inputs)[0] * directions).sum().backward()
        return gradients(model)

    true = gradients_of(copy.deepcopy(model).double())
    stock = gradients_of(model)
    assert len(invact.patch(model, inputs).fused) == NORMS
    farther = ((gradients_of(model) - true).norm() / (stock - true).norm()).item()
    record_property("error of gradients through fused norms, x stock's", farther)
    assert farther <= 1.25


@NEEDS_A_CARD
@WITH_NORMS
def test_with_fused_norms_what_the_allocator_holds_falls_by_what_the_report_says(
    make, fused_here, record_property
) -> None:
    model, inputs = with_norms(make, 512, 8, 512)
    held_by_forward(model, inputs)
    stock = held_by_forward(model, inputs)
    report = invact.patch(model, inputs)
    assert len(report.fused) == NORMS
    held_by_forward(model, inputs)
    off = (stock - held_by_forward(model, inputs)) / (report.bytes_before - report.bytes_after) - 1
    record_property("bytes held with fused norms, off from the report", abs(off))
    assert abs(off) < 0.01


def stock_and_fused(stock: nn.Module) -> tuple[nn.Module, nn.Module, Tensor]:
    """In fp32, with two norms."""
    vary_weights_of_norms(stock)
    stock.to(DEVICE)
    patched, x = copy.deepcopy(stock), torch.randn(128, 64, device=DEVICE)
    assert len(invact.patch(patched, (x,)).fused) == 2
    return stock, patched, x


def norms_between_products() -> nn.Module:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64), LlamaRMSNorm(64), nn.Linear(64, 64), GemmaRMSNorm(64), nn.Linear(64, 8)))


def test_a_gradient_penalty_through_fused_norms_agrees_with_stock(fused_here) -> None:
    stock, patched, x = stock_and_fused(norms_between_products())
    for model in (stock, patched):
        own = x.clone().requires_grad_()
        y = model(own)
        if DEVICE.type == "cuda":
            assert fused_nodes(y) == (2 if model is patched else 0)
        (dx,) = torch.autograd.grad(y.square().sum(), own, create_graph=True)
        (y.square().mean() + dx.square().mean()).backward()
    assert_same_gradients(patched, stock)


def test_func_grad_around_fused_norms_agrees_with_stock(fused_here) -> None:
    stock, patched, x = stock_and_fused(norms_between_products())

    def of(model: nn.Module) -> dict[str, Tensor]:
        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, weights, (x,)).square().mean()

        return torch.func.grad(loss)(dict(model.named_parameters()))

    torch.testing.assert_close(of(patched), of(stock))


@NEEDS_A_CARD
def test_a_step_with_fused_norms_is_captured_in_a_cuda_graph_and_replays_to_stocks_gradients(fused_here) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    stock, patched, x = stock_and_fused(nn.Sequential(Gated(64, 0.0, LlamaRMSNorm), Gated(64, 0.0, GemmaRMSNorm)))
    assert_replays_to_stocks_gradients(patched, stock, x)
