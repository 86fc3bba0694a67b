"""RMS norms that a model writes out in steps are recognised by what they compute and, on a GPU, run by one operator."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from norms_in_steps import vary_weights_of_norms
from small_models import small_model
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import invact
from invact.planning import fusing
from invact.planning import plans as planning
from invact.planning.options import Options
from invact.planning.plans import decide_for_device
from invact.pytorch.operators import has_fused_rms_norm
from invact.recognition.norm_costs import accesses_in_steps, own_rounding_of
from invact.recognition.norms_in_steps import walk_norms
from invact.simulation.setting import Setting

SIZES = {"vocab_size": 64, "intermediate_size": 96}


def llama():
    return small_model("LlamaForCausalLM", **SIZES, head_dim=16)


def gemma():
    return small_model("GemmaForCausalLM", **SIZES, head_dim=16)


def t5():
    return small_model("T5EncoderModel", d_ff=96, vocab_size=64, dropout_rate=0.0)


MODELS = pytest.mark.parametrize("make", [llama, gemma, t5], ids=lambda make: make.__name__)
NEEDS_FUSED = pytest.mark.skipif(
    not has_fused_rms_norm(torch.device("cuda")), reason="this PyTorch has no fused RMS norm for GPUs"
)


def trained(make, dtype=torch.float32):
    """A model whose norms have weights of their own, and its inputs."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    vary_weights_of_norms(model)
    return model, {"input_ids": torch.randint(0, 64, (2, 32))}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs)[0].float().square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


# --- computed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_the_true_value_rounded_once(kind, dtype):
    module = kind(256).to(dtype)
    nn.init.normal_(module.weight)
    x = (3 * torch.randn(64, 256)).to(dtype)
    (found,) = walk_norms(iter([("", module)]))
    y, true = found.fusion.norm(x, module.weight), found.fusion.norm.in_float64(x, module.weight)
    assert y.dtype is dtype
    unit = torch.finfo(dtype).eps * 2.0 ** true.abs().clamp(torch.finfo(dtype).tiny).log2().floor()
    assert ((y.double() - true).abs() <= 0.51 * unit).all()


def test_the_steps_of_a_llama_move_nine_times_the_bytes_of_one_operator():
    (found,) = walk_norms(iter([("", LlamaRMSNorm(1024).bfloat16())]))
    # Forward alone: a cast 2 + 4, a power 4 + 4, a mean 4, a product 4 + 4, a cast 4 + 2, a product 2 + 2.
    assert accesses_in_steps(found, torch.bfloat16) == pytest.approx(128, abs=2)
    assert found.fusion.norm.accesses(torch.bfloat16) == 14


def test_rounded_at_every_step_it_is_farther_from_the_truth_than_rounded_once():
    (found,) = walk_norms(iter([("", LlamaRMSNorm(256).bfloat16())]))
    rounding = own_rounding_of(found, torch.bfloat16)
    assert rounding.own > 1.2 * rounding.once > 0


@MODELS
def test_fused_a_model_gets_stocks_gradients_as_far_as_either_is_right(make, fused_here, monkeypatch):
    calls, fused_operator = [], F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: calls.append(0) or fused_operator(*args))
    model, inputs = trained(make)
    exact = gradients(copy.deepcopy(model).double(), inputs)
    stock = gradients(model, inputs)
    report = invact.patch(model, inputs)
    assert len(report.fused) == 5
    calls.clear()
    fused = gradients(model, inputs)
    assert len(calls) == 5
    assert (fused - exact).norm() <= 2 * (stock - exact).norm() + 1e-7 * exact.norm()

    short, inputs = trained(make, torch.bfloat16)
    exact = gradients(copy.deepcopy(short).double(), inputs)
    stock = gradients(short, inputs)
    assert len(invact.patch(short, inputs).fused) == 5
    assert (gradients(short, inputs) - exact).norm() <= 1.25 * (stock - exact).norm()


def test_where_there_is_no_kernel_for_it_the_stock_steps_run_bit_for_bit():
    model, inputs = trained(llama)
    stock = gradients(model, inputs)
    decided = decide_for_device(model, inputs, device="cpu")
    assert not decided.report.fused
    with planned_for_a_gpu(model, inputs).applied(model):
        assert torch.equal(model(**inputs)[0], copy.deepcopy(model)(**inputs)[0])
        if not planned_for_a_gpu(model, inputs).modules:
            assert torch.equal(gradients(model, inputs), stock)


def planned_for_a_gpu(model, inputs, **arguments):
    return decide_for_device(model, inputs, device="cuda", **arguments)


# --- decided ------------------------------------------------------------------------------------------


@NEEDS_FUSED
def test_a_plan_for_a_gpu_fuses_every_norm_and_keeps_no_more():
    model, inputs = trained(llama, torch.bfloat16)
    report = planned_for_a_gpu(model, inputs).report
    assert [norm.path for norm in report.fused] == [
        *(f"model.layers.{i}.{name}layernorm" for i in (0, 1) for name in ("input_", "post_attention_")),
        "model.norm",
    ]
    (norm, *_) = report.fused
    assert norm.module_class == "LlamaRMSNorm"
    assert norm.bytes_moved == 14 * 2 * 32 * 64
    assert norm.bytes_moved_in_steps > 8 * norm.bytes_moved
    assert "rounded once" in norm.reason
    assert "LlamaRMSNorm" in str(report)
    assert report.to_dict()["fused"][0]["path"] == norm.path
    in_steps = planned_for_a_gpu(model, inputs, exact=True).report
    assert not in_steps.fused
    # Inverted, an activation keeps a bit for each element that deriving does not; nothing else differs.
    bits = sum(2 * 32 * 96 // 8 for _ in range(2))
    assert report.bytes_after <= in_steps.bytes_after + bits + 5 * 2 * 32 * 4


@NEEDS_FUSED
def test_a_fused_norms_output_is_made_again_in_one_step():
    model, inputs = trained(llama, torch.bfloat16)
    derived = planned_for_a_gpu(model, inputs).report.derived
    norms_of = [tensor for tensor in derived if tensor.what == "LlamaRMSNorm's output"]
    assert len(norms_of) == 5
    assert not any("steps" in tensor.reason for tensor in norms_of)


@NEEDS_FUSED
def test_include_and_exclude_hold_for_norms_as_well():
    model, inputs = trained(llama, torch.bfloat16)
    assert invact.plan(model, inputs).fused == []  # on a CPU

    def fused(**arguments):
        setting = Setting(torch.device("cuda"))
        report = planning.decide_in(model, inputs, setting, Options(**arguments)).report
        return [norm.path for norm in report.fused]

    assert fused(include="model.norm*") == ["model.norm"]
    assert len(fused(exclude="*.layers.0.*")) == 3


class ChangesItsInputLater(nn.Module):
    def __init__(self, changes):
        super().__init__()
        self.norm, self.linear, self.changes = LlamaRMSNorm(64), nn.Linear(64, 64), changes

    def forward(self, x):
        x = self.linear(x)
        y = self.linear(self.norm(x))
        return (x.add_(1.0) if self.changes else x + 1.0) + y


@NEEDS_FUSED
@pytest.mark.parametrize("changes", [False, True])
def test_a_norm_whose_input_is_changed_later_keeps_its_steps_which_keep_a_copy(changes):
    model = ChangesItsInputLater(changes).bfloat16()
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert len(planned_for_a_gpu(model, (x,)).report.fused) == (0 if changes else 1)


class NormsHeads(nn.Module):
    """A view at the end goes by the strides that a norm in steps leaves as they are."""

    def __init__(self, turned):
        super().__init__()
        self.q, self.norm, self.turned = nn.Linear(64, 64), LlamaRMSNorm(16), turned

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], 4, 16)
        q = self.norm(q.transpose(1, 2)).transpose(1, 2) if self.turned else self.norm(q)
        return q.view(x.shape)


@NEEDS_FUSED
@pytest.mark.parametrize("turned", [False, True])
def test_a_norm_of_what_is_not_contiguous_keeps_its_steps_and_its_strides(turned, fused_here):
    model, x = NormsHeads(turned), torch.randn(2, 8, 64)
    assert len(planned_for_a_gpu(model, (x,)).report.fused) == (0 if turned else 1)
    invact.patch(model, (x,))
    model(x).sum().backward()


@NEEDS_FUSED
def test_norms_in_16_bits_under_autocast_keep_their_steps():
    model, inputs = trained(llama, torch.bfloat16)
    assert not planned_for_a_gpu(model, inputs, autocast=torch.bfloat16).report.fused
    model, inputs = trained(llama)
    assert len(planned_for_a_gpu(model, inputs, autocast=torch.bfloat16).report.fused) == 5


@NEEDS_FUSED
def test_a_fused_norm_that_is_called_past_functional_is_planned_as_kept_since_nothing_tells_its_eps():
    class Direct(nn.RMSNorm):
        def forward(self, x):
            return torch.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    for kind, derived in ((nn.RMSNorm, 1), (Direct, 0)):
        model = nn.Sequential(kind(64, eps=1e-6), nn.Linear(64, 64, bias=False)).bfloat16()
        assert len(planned_for_a_gpu(model, (x,)).report.derived) == derived


@NEEDS_FUSED
def test_a_plan_counts_a_models_own_fused_norm_as_a_gpu_keeps_it():
    """Its input and one number in 32 bits for each row, beside what the linear layer keeps."""
    model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 64, bias=False)).bfloat16()
    x = torch.randn(128, 64, dtype=torch.bfloat16, requires_grad=True)
    report = planned_for_a_gpu(model, (x,)).report
    assert report.bytes_before == 2 * (2 * 128 * 64) + 4 * 128


# --- applied ------------------------------------------------------------------------------------------


def test_what_its_code_reads_is_watched(fused_here):
    model, inputs = trained(llama)
    invact.patch(model, inputs)
    fused = model(**inputs)[0]
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.variance_epsilon = 0.5
    changed = model(**inputs)[0]
    invact.unpatch(model)
    assert torch.equal(changed, model(**inputs)[0])
    assert not torch.allclose(fused, changed, atol=1e-3)


def test_the_module_stays_the_users_and_comes_back_stock(fused_here):
    model, inputs = trained(llama)
    norm, keys = model.model.norm, list(model.state_dict())
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    invact.patch(model, inputs)
    assert model.model.norm is norm
    assert isinstance(norm, LlamaRMSNorm)
    assert type(norm) is not LlamaRMSNorm
    assert list(model.state_dict()) == keys
    model(**inputs)
    assert seen
    assert type(pickle.loads(pickle.dumps(copy.deepcopy(norm.weight)))) is nn.Parameter
    invact.unpatch(model)
    assert type(norm) is LlamaRMSNorm


def test_without_gradients_and_under_transforms_the_stock_steps_run(fused_here, monkeypatch):
    module = nn.Sequential(nn.Linear(64, 64), LlamaRMSNorm(64))
    x = torch.randn(8, 64)
    invact.patch(module, (x,))
    monkeypatch.setattr(F, "rms_norm", None)  # whoever calls it fails
    with pytest.raises(TypeError):
        module(x)
    with torch.no_grad():
        module(x)
    weights = dict(module.named_parameters())
    torch.func.grad(lambda weights: torch.func.functional_call(module, weights, (x,)).sum())(weights)


def test_a_norm_of_another_dtype_than_its_weight_keeps_stocks_dtype(fused_here):
    module = nn.Sequential(nn.Linear(64, 64), LlamaRMSNorm(64))
    invact.patch(module, (torch.randn(8, 64),))
    module[0].bfloat16()
    assert module(torch.randn(8, 64, dtype=torch.bfloat16)).dtype is torch.float32


def test_that_steps_cost_more_is_asked_and_not_taken_for_granted(fused_here, monkeypatch):
    model, inputs = trained(llama)
    monkeypatch.setattr(fusing, "accesses_in_steps", lambda found, dtype: 20.0)
    assert not invact.plan(model, inputs).fused
