"""Monotone curves in models: found with their parameters, right in bytes and in gradients."""

import pytest
import torch
from torch import nn

import invact


class Residual(nn.Module):
    """Of a few layers with one activation between them."""

    def __init__(self, activation):
        super().__init__()
        self.a, self.activation, self.b = nn.Linear(16, 64), activation, nn.Linear(64, 16)

    def forward(self, x):
        return x + self.b(self.activation(self.a(x)))


class SquaredReLU(nn.Module):
    def forward(self, x):
        return torch.relu(x).square()


MONOTONE = {
    "elu(alpha=0.7)": nn.ELU(0.7),
    "celu(alpha=2)": nn.CELU(2.0),
    "selu": nn.SELU(),
    "leaky_relu(negative_slope=0.2)": nn.LeakyReLU(0.2),
    "softplus(beta=2, threshold=20)": nn.Softplus(2),
    "log_sigmoid": nn.LogSigmoid(),
    "softsign": nn.Softsign(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh(min_val=-0.3, max_val=0.7)": nn.Hardtanh(-0.3, 0.7),
    "relu6": nn.ReLU6(),
    "squared_relu": SquaredReLU(),
}


@pytest.mark.parametrize(("name", "activation"), MONOTONE.items(), ids=MONOTONE)
def test_a_monotone_curve_frees_its_input_and_keeps_no_bit(name, activation, count_kept, run_backward):
    model, x = Residual(activation), 3 * torch.randn(33, 16)
    before, (_, expected) = count_kept(model, (x,)), run_backward(model, (x,))

    report = invact.patch(model, (x,))
    (site,) = report.sites
    assert (site.activation, site.action) == (name, "invert")
    # Softsign and log-sigmoid keep more than their input.
    assert site.bytes_saved == before - report.bytes_after >= 33 * 64 * 4
    assert count_kept(model, (x,)) == report.bytes_after
    _, gradients = run_backward(model, (x,))
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=1e-5)


def test_a_softplus_with_a_jump_keeps_one_bit(count_kept, run_backward):
    model, x = Residual(nn.Softplus(beta=1, threshold=0.5)), torch.randn(264, 16)
    before, (_, expected) = count_kept(model, (x,)), run_backward(model, (x,))
    report = invact.patch(model, (x,))
    assert before - report.bytes_after == 264 * 64 * 4 - 264 * 64 // 8
    torch.testing.assert_close(run_backward(model, (x,))[1], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", [nn.ELU(inplace=True), nn.LeakyReLU(inplace=True)], ids=str)
def test_what_stock_keeps_by_output_because_it_works_in_place_stays(activation):
    (site,) = invact.plan(Residual(activation), (torch.randn(4, 16),)).sites
    assert (site.action, site.reason) == ("keep", "stock PyTorch already keeps only its output")


def test_a_relu_written_as_a_clamp_is_inverted_since_stock_keeps_its_input(count_kept):
    class Clamp(nn.Module):
        def forward(self, x):
            return x.clamp(min=0)

    model, x = Residual(Clamp()), torch.randn(4, 16)
    report = invact.patch(model, (x,))
    assert [(site.activation, site.action) for site in report.sites] == [("relu", "invert")]
    assert count_kept(model, (x,)) == report.bytes_after


def test_the_report_counts_the_bits_and_is_right(count_kept):
    model, x = Residual(nn.GELU()), torch.randn(264, 16)
    report = invact.patch(model, (x,))
    assert report.sites[0].bytes_saved == 264 * 64 * 4 - 264 * 64 // 8
    assert count_kept(model, (x,)) == report.bytes_after


class TanhSteps(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def test_the_reason_says_where_a_module_rounds_every_step_and_that_ours_is_nearer_to_float64():
    model, x = Residual(TanhSteps()).bfloat16(), torch.randn(4, 16).bfloat16()
    (site,) = invact.plan(model, (x,)).sites
    assert "in bfloat16 it rounds every step and is" in site.reason
    own, ours = (float(part.split()[0]) for part in (site.reason.split("is ")[-1], site.reason.split("ours ")[-1]))
    assert ours < own

    (site,) = invact.plan(model.float(), (x.float(),)).sites
    assert "rounds" not in site.reason
    (site,) = invact.plan(Residual(nn.GELU()).bfloat16(), (x,)).sites
    assert "rounds" not in site.reason


def test_an_expression_says_so_too():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x):
            x = self.a(x)
            return self.b(x * torch.sigmoid(1.702 * x))

    (site,) = invact.plan(Written().bfloat16(), (torch.randn(4, 16).bfloat16(),)).sites
    assert site.activation == "quick_gelu"
    assert "in bfloat16 it rounds every step" in site.reason
