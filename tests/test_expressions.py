"""Activations written out in a method are found, inverted where it pays, and put back without a trace."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written_blocks import FOUND, Block, CallsFunctional

import invact
from invact.recognition.expressions import written_in


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_expressions_are_found_inverted_and_put_back(kind, count_kept, run_backward):
    model, x = kind(), torch.randn(4, 16)
    kept, (output, gradient) = count_kept(model, (x,)), run_backward(model, (x,))
    attributes = dict(model.__dict__)

    report = invact.patch(model, (x,))
    assert sorted(site.path for site in report.inverted) == sorted(FOUND[kind])
    assert report.bytes_before == kept
    assert report.bytes_after == count_kept(model, (x,)) < kept
    after = run_backward(model, (x,))
    torch.testing.assert_close(after[0], output, rtol=1e-5, atol=1e-5)
    assert (after[1] - gradient).norm() < 1e-4 * gradient.norm()

    assert model.__dict__ == attributes
    with torch.no_grad():
        assert torch.equal(model(x).flatten(), output)
    assert invact.unpatch(model) == len(FOUND[kind])
    assert type(model) is kind
    assert model.__dict__ == attributes
    assert torch.equal(run_backward(model, (x,))[1], gradient)


@pytest.mark.parametrize(
    ("expression", "curve"),
    [
        ("F.elu(x, 0.7)", "elu(alpha=0.7)"),
        ("F.leaky_relu(x, 0.2)", "leaky_relu(negative_slope=0.2)"),
        ("torch.where(x > 0, x, 0.1 * x)", "leaky_relu(negative_slope=0.1)"),
        ("torch.maximum(x, 0.3 * x)", "leaky_relu(negative_slope=0.3)"),
        ("F.softplus(x, beta=2)", "softplus(beta=2, threshold=20)"),
        ("x / (1 + torch.abs(x))", "softsign"),
        ("F.logsigmoid(x)", "log_sigmoid"),
        ("-F.softplus(-x)", "log_sigmoid"),
        ("torch.clamp(x, 0, 6)", "relu6"),
        ("x.clip(0, 6)", "relu6"),
        ("x.clamp_(0, 6)", "relu6"),
        ("x.clamp_min(0)", "relu"),
        ("F.hardtanh_(x)", "hardtanh"),
        ("x.clamp_min(-2).clamp_max(0.5)", "hardtanh(min_val=-2, max_val=0.5)"),
        ("F.relu(x) ** 2", "squared_relu"),
        ("x.clamp(min=0).square()", "squared_relu"),
        ("0.5 * x * torch.erfc(-x * math.sqrt(0.5))", "gelu"),
        ("0.5 * x * (1 + torch.special.erf(x / math.sqrt(2)))", "gelu"),
        ("torch.multiply(x, torch.special.expit(x))", "silu"),
        ("torch.divide(x, 1 + torch.exp(-x))", "silu"),
    ],
)
def test_an_activation_is_found_in_whatever_operations_it_is_written(
    expression, curve, block_that_computes, count_kept, run_backward
):
    model, x = block_that_computes(expression), torch.randn(4, 16)
    _, expected = run_backward(model, (x,))
    report = invact.patch(model, (x,))
    assert [(site.activation, site.action) for site in report.sites] == [(curve, "invert")]
    assert count_kept(model, (x,)) == report.bytes_after
    torch.testing.assert_close(run_backward(model, (x,))[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["elu", "celu", "selu", "leaky_relu"])
def test_what_stock_computes_in_place_from_its_output_stays(name, block_that_computes):
    (site,) = invact.plan(block_that_computes(f"F.{name}_(x)"), (torch.randn(4, 16),)).sites
    assert (site.action, site.reason) == ("keep", "stock PyTorch already keeps only its output")


def test_several_in_one_method_are_told_apart_and_chosen_by_path():
    class Several(Block):
        def forward(self, x):
            x = self.down(F.gelu(self.up(x)))
            x = self.down(F.gelu(self.up(x)).relu())
            return self.down(F.gelu(self.up(F.silu(x))))

    report = invact.plan(nn.Sequential(Several()), (torch.randn(4, 16),))
    assert [(site.path, site.module_class) for site in report.sites] == [
        ("0.forward:gelu", "F.gelu(…)"),
        ("0.forward:relu", "….relu()"),
        ("0.forward:gelu.2", "F.gelu(…)"),
        ("0.forward:gelu.3", "F.gelu(…)"),
        ("0.forward:silu", "F.silu(x)"),
    ]
    chosen = invact.plan(nn.Sequential(Several()), (torch.randn(4, 16),), include="*:gelu.3")
    assert [site.path for site in chosen.inverted] == ["0.forward:gelu.3"]


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("F.gelu(self.up(x)) + F.softmax(x.sum(), 0)", ["gelu"]),
        ("F.dropout(x, 0.1, self.training)", []),
        ("self.up(x) * torch.sigmoid(self.up(x))", ["sigmoid"]),
        ("x.exp()", []),
        ("x * torch.sigmoid(x.detach())", ["sigmoid"]),
        ("torch.max(x, 1)[0] + x", []),
        ("torch.where(x > 0, x, x - 1)", []),
        ("F.prelu(x, self.up.bias[:1])", []),
        ("F.rrelu(x, 0.1, 0.3)", []),
    ],
)
def test_what_is_no_activation_of_one_value_is_not_taken_for_one(expression, found, block_that_computes):
    assert [str(written.curve) for written in written_in(block_that_computes(expression))] == found


def test_other_instances_of_the_class_and_other_threads_are_not_touched():
    patched, other = CallsFunctional(), CallsFunctional()
    invact.patch(patched, (torch.randn(4, 16),))
    assert type(other) is CallsFunctional
    assert type(patched) is not CallsFunctional
    assert isinstance(patched, CallsFunctional)


def test_a_deepcopy_trains_by_itself_and_a_pickle_comes_back_stock(run_backward):
    model, x = CallsFunctional(), torch.randn(4, 16)
    expected = run_backward(model, (x,))[1]
    invact.patch(model, (x,))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.up.weight.zero_()
    assert (run_backward(twin, (x,))[1] - expected).norm() < 1e-5 * expected.norm()
    assert invact.unpatch(twin) == 1
    assert torch.equal(run_backward(twin, (x,))[1], expected)
    assert torch.equal(run_backward(pickle.loads(pickle.dumps(twin)), (x,))[1], expected)


def thrice(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 3 * function(self, x)

    return wrapper


class Wrapped(Block):
    @thrice
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class WrappedLater(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("wrapped", ["in the source", "later", "on the module", "by another name"])
def test_an_expression_behind_a_wrapper_is_left_alone(wrapped, monkeypatch, run_backward):
    model, x = Wrapped() if wrapped == "in the source" else WrappedLater(), torch.randn(4, 16)
    original = WrappedLater.forward
    if wrapped == "later":
        monkeypatch.setattr(WrappedLater, "forward", functools.wraps(original)(lambda self, x: 3 * original(self, x)))
    elif wrapped == "on the module":
        model.forward = functools.partial(original, model)
    elif wrapped == "by another name":
        monkeypatch.setattr(WrappedLater, "forward", lambda self, x: 3 * original(self, x))
    expected = run_backward(model, (x,))[1]
    assert invact.patch(model, (x,)).sites == []
    assert torch.equal(run_backward(model, (x,))[1], expected)


def test_pytorchs_own_transformer_layer_calls_its_activation_as_an_attribute(run_backward):
    model = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = run_backward(model, (x,))[1]
    report = invact.patch(model, (x,))
    assert [site.path for site in report.inverted] == ["_ff_block:gelu"]
    assert (run_backward(model, (x,))[1] - expected).norm() < 1e-4 * expected.norm()
