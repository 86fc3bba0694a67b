"""An activation is recognised by what it computes; a lookalike is not."""

import math

import pytest
import torch
from torch import nn

from invact.kernels.curves import monotone_families
from invact.recognition.curves import recognise


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class FromAutogradFunction(nn.Module):
    """As Bloom's: f is written as an autograd function of its own."""

    class Swish(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * torch.sigmoid(x)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            s = torch.sigmoid(x)
            return dy * s * (1 + x * (1 - s))

    def forward(self, x):
        return self.Swish.apply(x)


class OnlyImages(nn.Module):
    def forward(self, x):
        _, _, height, width = x.shape
        return nn.functional.gelu(x.reshape(-1, height * width)).view_as(x)


@pytest.mark.parametrize(
    ("module", "curve"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
        (nn.ELU(), "elu"),
        (nn.ELU(alpha=0.7), "elu(alpha=0.7)"),
        (nn.ELU(alpha=2.5, inplace=True), "elu(alpha=2.5)"),
        (nn.CELU(alpha=2.0), "celu(alpha=2)"),
        (nn.SELU(), "selu"),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2), "leaky_relu(negative_slope=0.2)"),
        (nn.Softplus(), "softplus"),
        (nn.Softplus(beta=2), "softplus(beta=2, threshold=20)"),
        (nn.Softplus(beta=0.5, threshold=3.7), "softplus(beta=0.5, threshold=3.7)"),
        (nn.LogSigmoid(), "log_sigmoid"),
        (nn.Softsign(), "softsign"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.Hardtanh(), "hardtanh"),
        (nn.Hardtanh(-0.3, 0.7), "hardtanh(min_val=-0.3, max_val=0.7)"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.LeakyReLU(1.7), "leaky_relu(negative_slope=1.7)"),
        (nn.LeakyReLU(1e-9), "leaky_relu(negative_slope=1e-09)"),
        (nn.CELU(alpha=1000.0), "celu(alpha=1000)"),
        (nn.Softplus(beta=1, threshold=0), "softplus(beta=1, threshold=0)"),
        (nn.Hardtanh(0, 2000.0), "hardtanh(min_val=0, max_val=2000)"),
        (Lambda(lambda x: torch.relu(x).clamp(max=65504)), "hardtanh(min_val=0, max_val=65504)"),
        (nn.Threshold(0.0, 0.0), "relu"),
        (Lambda(lambda x: nn.functional.relu(x) ** 2), "squared_relu"),
        (Lambda(lambda x: x / (1 + x.abs())), "softsign"),
        (Lambda(lambda x: -nn.functional.softplus(-x)), "log_sigmoid"),
        (Lambda(lambda x: x.clamp(min=0)), "relu"),
        (Lambda(lambda x: torch.where(x > 0, x, 0.3 * x)), "leaky_relu(negative_slope=0.3)"),
        (Lambda(lambda x: torch.logaddexp(x, torch.zeros_like(x))), "softplus"),
        (Lambda(lambda x: x * torch.sigmoid(1.702 * x)), "quick_gelu"),
        (Lambda(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))), "gelu"),
        (Lambda(lambda x: nn.functional.gelu(x.float()).to(x.dtype)), "gelu"),
        (FromAutogradFunction(), "silu"),
        (OnlyImages(), "gelu"),
    ],
    ids=str,
)
def test_known_curves_are_found_in_whatever_class(module, curve):
    assert str(recognise(module)) == curve


@pytest.mark.parametrize(
    "name",
    ["gelu", "gelu_new", "gelu_fast", "gelu_python", "quick_gelu", "silu", "swish", "relu", "relu2", "leaky_relu"],
)
def test_hugging_face_activations_are_found(name):
    from transformers.activations import ACT2FN

    expected = {
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_python": "gelu",
        "swish": "silu",
        "relu2": "squared_relu",
    }
    assert str(recognise(ACT2FN[name])) == expected.get(name, name)


def test_timm_open_clip_and_bloom_activations_are_found():
    from open_clip.transformer import QuickGELU
    from timm.layers.activations import GELUTanh, Swish
    from transformers.models.bloom.modeling_bloom import BloomGelu

    assert str(recognise(QuickGELU())) == "quick_gelu"
    assert str(recognise(GELUTanh())) == "gelu_tanh"
    assert str(recognise(Swish(inplace=True))) == "silu"
    assert str(recognise(BloomGelu())) == "gelu_tanh"


@pytest.mark.parametrize(
    "module",
    [nn.ELU(1 / 3), nn.CELU(1 / 3), nn.CELU(50.0), nn.LeakyReLU(1 / 3), nn.Softplus(1 / 3), nn.Softplus(0.1, 1 / 7)],
    ids=str,
)
def test_the_parameters_found_give_the_modules_own_output(module):
    x = torch.linspace(-60, 60, 10007)
    curve = recognise(module)
    assert torch.equal(curve.f(x), module(x))
    found, own = curve.f(x.double()), module(x.double())
    torch.testing.assert_close(found, own, rtol=1e-15, atol=1e-15)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self._calls = 0

    def forward(self, x):
        self._calls += 1
        return nn.functional.gelu(x)


class OnlyInEvaluation(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(nn.functional.gelu(x), 0.1, self.training)


class WithBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x):
        return nn.functional.gelu(x + self.shift)


@pytest.mark.parametrize(
    "module",
    [
        nn.Identity(),
        nn.Softmax(dim=-1),
        nn.Dropout(0.0),
        nn.LayerNorm(96, elementwise_affine=False),
        nn.GLU(),
        nn.Flatten(),
        nn.Linear(4, 4),
        nn.Sequential(nn.GELU()),
        nn.LeakyReLU(-0.1),
        nn.LeakyReLU(1.0),
        nn.RReLU(),
        nn.Threshold(0.1, 0.0),
        nn.Hardshrink(),
        Lambda(lambda x: nn.functional.elu(x) + 1e-4),
        Lambda(lambda x: torch.where(x > 0, x, torch.zeros_like(x) - 0.5)),
        Lambda(lambda x: nn.functional.gelu(x) + 1e-4 * x.mean()),
        Lambda(lambda x: nn.functional.gelu(x) + 1e-4 * x.roll(1, -1)),
        Lambda(lambda x: nn.functional.gelu(x).clamp(max=10)),
        Lambda(lambda x: nn.functional.gelu(x).clamp(max=65504)),  # the largest fp16
        Lambda(lambda x: x.clamp(max=1)),
        Lambda(lambda x: torch.relu(x) ** 3),
        Lambda(lambda x: nn.functional.softplus(x) - math.log(2)),
        Lambda(lambda x: x + (nn.functional.gelu(x) - x).detach()),  # straight through
        Lambda(lambda x: x.detach() * torch.sigmoid(x)),
        Lambda(lambda x: torch.relu(x).detach()),
        Lambda(lambda x: nn.functional.gelu(1.001 * x)),
        Lambda(lambda x: nn.functional.gelu(x) + 1e-3 * torch.randn_like(x)),
        Lambda(lambda x: (nn.functional.gelu(x), x)),
        OnlyInEvaluation(),
        Counts(),
        WithBias(),
    ],
    ids=str,
)
def test_lookalikes_are_not(module):
    assert recognise(module) is None


def test_recognition_leaves_the_module_and_the_random_stream_alone():
    module = Counts()
    handle = module.register_forward_hook(lambda *args: pytest.fail("a hook was called"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    recognise(module)
    recognise(nn.RReLU())
    assert torch.equal(torch.rand(1), expected)
    assert module._calls == 0
    assert module.training
    handle.remove()


def test_a_bound_of_minus_zero_is_zero_whichever_was_asked_for_first():
    assert {str(monotone_families.hardtanh(low, 60000.0)) for low in (-0.0, 0.0)} == {
        "hardtanh(min_val=0, max_val=60000)"
    }
