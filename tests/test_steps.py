"""The peak of a training step, simulated, is that of a real one: to the byte of a count written apart from it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import small_trained
import torch
import transformers
from described import described
from real_steps import OPTIMIZERS, counted_peak
from small_trained import inputs_for, token_inputs
from torch import nn

from invact import patchers
from invact.bench.random_models import with_weights
from invact.fitting.optimizers import NotSimulatedError
from invact.fitting.simulated_training import simulated_training
from invact.planning.plans import decide
from invact.pytorch.containers import tree_map_only
from invact.simulation.setting import Setting, device_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

KINDS = ["gpt2", "llama", "tied_llama", "lora_llama", "frozen_gpt2", "bert", "t5", "vit", "resnet", "sequential"]


def simulated_step(model, inputs, optimizer="adamw", autocast=None, accumulating=False):
    setting = Setting(device_of(model), autocast)
    with simulated_training(model, inputs, setting, optimizer, accumulating=accumulating) as take_step:
        return take_step()


def made(kind, dtype=torch.float32):
    model = getattr(small_trained, kind)().to(dtype)
    inputs = inputs_for(model)
    return model, tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)


def assert_as_counted(model, inputs, optimizer="adamw", autocast=None, accumulating=False):
    """The peak and what is kept are those of the real steps, and what is alive at the peak is all told of."""
    step = simulated_step(model, inputs, optimizer, autocast, accumulating)
    peak, kept = counted_peak(model, inputs, optimizer, autocast, accumulating)
    assert step.peak_bytes == peak
    if autocast is None:  # its casts of weights are not among what is kept
        assert step.kept_bytes == kept
    assert sum(step.kinds_at(step.highest).values()) == step.peak_bytes
    return step


def assert_as_counted_patched(model, inputs, autocast=None, exact=False, **options):
    with decide(model, inputs, autocast=autocast, exact=exact).applied(model):
        return assert_as_counted(model, inputs, autocast=autocast, **options)


# --- the peak -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_peak_is_that_of_a_real_step_as_it_is_and_patched(kind):
    model, inputs = made(kind)
    stock = assert_as_counted(model, inputs)
    patched = assert_as_counted_patched(model, inputs)
    assert patched.kept_bytes < stock.kept_bytes


@pytest.mark.parametrize("kind", ["lora_llama", "t5", "vit"])
def test_peak_is_that_of_a_real_step_in_bf16(kind):
    assert_as_counted_patched(*made(kind, torch.bfloat16))


@pytest.mark.parametrize("kind", ["gpt2", "lora_llama", "resnet"])
def test_peak_is_that_of_a_real_step_under_autocast(kind):
    step = assert_as_counted_patched(*made(kind), autocast=torch.bfloat16)
    assert any(kinds.get("casts of weights") for _, kinds in step.course(100))


@pytest.mark.parametrize(("kind", "autocast"), [("gpt2", torch.bfloat16), ("vit", None)])
def test_peak_is_that_of_a_real_step_patched_exactly(kind, autocast):
    assert_as_counted_patched(*made(kind), autocast=autocast, exact=True)


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [*(("sequential", each) for each in OPTIMIZERS), ("vit", "adamw-fused"), ("vit", "adafactor")],
)
def test_peak_is_that_of_a_real_step_with_every_optimizer(kind, optimizer):
    assert_as_counted(*made(kind), optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_where_the_weights_are_most_the_peak_is_in_the_optimizers_step(optimizer):
    """Its temporary tensors stand beside all gradients."""
    step = assert_as_counted(*made("resnet"), optimizer)
    assert step.where(step.highest) == "in the optimizer's step"
    assert step.kinds_at(step.highest).keys() >= {"weights", "optimizer states", "gradients", "temporary"}


def test_an_optimizer_of_the_users_is_counted_with_its_settings():
    model, inputs = made("gpt2")

    def own():
        return torch.optim.AdamW(model.parameters(), amsgrad=True, foreach=True)

    step, (peak, _) = simulated_step(model, inputs, own()), counted_peak(model, inputs, own())
    assert step.peak_bytes == peak
    assert step.held.states > simulated_step(model, inputs, "adamw").held.states


@pytest.mark.parametrize(("kind", "autocast"), [("gpt2", torch.bfloat16), ("vit", None), ("resnet", torch.bfloat16)])
def test_gradients_of_earlier_batches_are_there_all_the_time(kind, autocast):
    step = assert_as_counted_patched(*made(kind), autocast=autocast, accumulating=True)
    gradients = [kinds.get("gradients", 0) for _, kinds in step.course(20)]
    trained = sum(weight.nbytes for weight in getattr(small_trained, kind)().parameters())
    assert all(nbytes >= trained for nbytes in gradients)


@pytest.mark.parametrize(("reentrant", "autocast"), [(False, None), (False, torch.bfloat16), (True, None)])
def test_what_transformers_checkpoints_is_run_once_more(reentrant, autocast):
    model, inputs = made("gpt2")
    whole = simulated_step(model, inputs, autocast=autocast)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert assert_as_counted(model, inputs, autocast=autocast).peak_bytes < whole.peak_bytes
    assert_as_counted_patched(model, inputs, autocast=autocast)


def test_what_timm_checkpoints_is_run_once_more():
    model, inputs = made("vit")
    whole = simulated_step(model, inputs)
    model.set_grad_checkpointing(True)
    assert assert_as_counted(model, inputs).kept_bytes < whole.kept_bytes
    assert_as_counted_patched(model, inputs, autocast=torch.bfloat16)


def test_a_model_without_a_loss_is_trained_on_the_sum_of_what_it_gives():
    model, inputs = made("gpt2")
    del inputs["labels"]
    step = assert_as_counted(model, inputs)
    assert step.where(step.highest) == "in forward, sum of the model itself"


def test_frozen_weights_have_neither_gradients_nor_states():
    whole, half = (simulated_step(*made(kind)) for kind in ("gpt2", "frozen_gpt2"))
    assert half.weights == whole.weights
    assert half.held.states < 0.6 * whole.held.states
    assert len(half.gradients) < len(whole.gradients)


def test_weights_that_are_tied_count_once():
    untied, tied = (simulated_step(*made(kind)) for kind in ("llama", "tied_llama"))
    embedding = small_trained.WORDS * 64 * 4
    assert untied.weights - tied.weights == embedding
    assert untied.held.states - tied.held.states == 2 * embedding + 4  # and a step's number


# --- what it says of it -------------------------------------------------------------------------------


def test_the_peak_of_a_language_model_with_a_large_vocabulary_is_at_its_loss():
    config = transformers.GPT2Config(vocab_size=8192, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).train()
    step = assert_as_counted(model, token_inputs())
    assert "LogSoftmaxBackward0" in step.where(step.highest)
    assert step.kinds_at(step.highest)["temporary"] >= 4 * 64 * 8192 * 4
    assert step.is_at_the_turn


def test_a_moment_in_a_block_is_said_with_its_path():
    step = simulated_step(*made("sequential"), optimizer="sgd")
    assert step.where(step.highest).startswith("in backward, ")
    assert step.where(step.highest).endswith(" of 3.3")
    assert step.where(step.backward_ended) == "in the optimizer's step"


def test_parts_sum_to_what_is_alive_at_every_moment():
    model, inputs = made("gpt2")
    step = simulated_step(model, inputs, autocast=torch.bfloat16, accumulating=True)
    course = step.course(40)
    assert [sum(kinds.values()) for _, kinds in course] == [step.resident + step.alive[moment] for moment, _ in course]
    assert max(sum(kinds.values()) for _, kinds in course) == step.peak_bytes


# --- what is left as it was ---------------------------------------------------------------------------


def normed():
    """With running means and variances among its buffers, and an activation in place."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.1)).train()


@pytest.mark.parametrize("kind", ["gpt2", "normed", "sequential"])
def test_model_gradients_and_random_states_are_left_as_they_were(kind):
    model, inputs = made(kind) if kind != "normed" else (normed(), (torch.randn(4, 3, 8, 8),))
    everything = (model, inputs)
    for number, weight in enumerate(model.parameters()):
        if number % 2:
            weight.grad = torch.ones_like(weight)
    torch.manual_seed(1)
    before, random_state = described(everything), torch.get_rng_state()
    setting = Setting(device_of(model))
    with simulated_training(model, inputs, setting, "adamw", accumulating=True) as take_step:
        take_step()
        take_step(with_work=True)
    assert described(everything) == before
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_optimizer_of_the_users_is_left_as_it_was():
    model, inputs = made("sequential")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    everything = (model, optimizer)
    before = described(everything)
    simulated_step(model, inputs, optimizer)
    assert described(everything) == before


# --- what can not be simulated ------------------------------------------------------------------------


class Branching(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x


class Given(nn.Sequential):
    """Takes no gradient."""

    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Branching, "A training step of Branching can not be simulated"),
        (Given, "Nothing that Given gives takes a gradient"),
    ],
)
def test_a_step_that_can_not_be_simulated_is_refused_and_changes_nothing(kind, why):
    model, inputs = kind(nn.Linear(8, 8), nn.GELU()), (torch.randn(2, 8),)
    everything = (model, inputs)
    before = described(everything)
    with pytest.raises(NotSimulatedError, match=why):
        simulated_step(model, inputs)
    assert described(everything) == before


def test_a_model_that_fails_in_backward_is_refused():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, dy):
            raise ValueError("no way back")

    class Model(nn.Linear):
        def forward(self, x):
            return Fails.apply(super().forward(x))

    with pytest.raises(NotSimulatedError, match="no way back"):
        simulated_step(Model(8, 8), (torch.randn(2, 8),))


# --- models as large as they are ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "batch", "tokens", "optimizer"),
    [
        ("gpt2", torch.float32, 2, 512, "adamw"),
        ("meta-llama/Llama-3.2-1B", torch.bfloat16, 1, 128, "sgd"),
    ],
)
def test_real_models_with_their_loss_keep_and_peak_as_told(name, dtype, batch, tokens, optimizer):
    model = with_weights(name).to(dtype)
    inputs = patchers.example_inputs(model, batch, tokens, loss=True)
    decided = decide(model, inputs)
    for way in (nullcontext(), decided.applied(model)):
        with way:
            step = simulated_step(model, inputs, optimizer)
            peak, kept = counted_peak(model, inputs, optimizer)
        assert step.peak_bytes == pytest.approx(peak, rel=0.03)
        assert step.kept_bytes == pytest.approx(kept, rel=0.03)
    assert decided.report.bytes_after == pytest.approx(step.kept_bytes, rel=0.03)
