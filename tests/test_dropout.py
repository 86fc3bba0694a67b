"""An activation and the dropout that alone takes its output keep what that gives and two bits."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from invact.kernels import CURVES
from torch import nn

import invact
from invact.dropout import announced, dropped
from invact.swapping import FusedDropout, Inverted


def block(p=0.3):
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(p), nn.Linear(64, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1001,), (3, 5, 7), (2, 3, 4, 6), (), (0, 4)])
def test_output_mask_and_random_stream_are_the_stock_ones(shape, dtype):
    x = (2 * torch.randn(shape)).to(dtype)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    gelu = CURVES["gelu"]
    results = []
    for run in (
        lambda x: F.dropout(F.gelu(x), 0.3),
        lambda x: dropped(announced(x, gelu), 0.3, training=True),
    ):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        z = run(leaf)
        z.backward(torch.ones_like(z))
        results.append((z.detach(), leaf.grad, torch.rand(1)))
    (z, gradient, following), (fused_z, fused_gradient, fused_following) = results
    assert torch.equal(fused_z, z)
    assert torch.equal(fused_following, following)
    assert (fused_gradient - gradient).norm() <= {2: 8e-3}.get(dtype.itemsize, 3e-6) * gradient.norm()


def test_first_and_second_derivatives_are_right():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(0)
        return dropped(announced(x, CURVES["silu"]), 0.3, training=True)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_a_patched_block_saves_what_it_says_and_is_undone(count_kept, run_backward):
    model, x = block(), torch.randn(8, 16)
    kept, (output, gradient) = count_kept(model, (x,)), run_backward(model, (x,))
    report = invact.patch(model, (x,))
    assert [type(m) for m in model] == [nn.Linear, Inverted, FusedDropout, nn.Linear]
    assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (x,)))
    after = run_backward(model, (x,))
    assert torch.equal(after[0], output)
    assert (after[1] - gradient).norm() < 1e-5 * gradient.norm()
    twin = copy.deepcopy(model)
    assert torch.equal(run_backward(twin, (x,))[1], after[1])
    assert type(pickle.loads(pickle.dumps(model))[2]) is nn.Dropout

    model[2].eval()  # a dropout that is switched off alone
    assert run_backward(model, (x,))[1].isfinite().all()
    model.eval()
    assert torch.equal(run_backward(model, (x,))[0], run_backward(twin.eval(), (x,))[0])
    model.train()
    assert invact.unpatch(model) == 1
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
    assert torch.equal(run_backward(model, (x,))[1], gradient)


def test_an_expression_before_a_dropout_is_fused_too(run_backward):
    model, x = (
        nn.TransformerEncoderLayer(16, 2, 64, dropout=0.2, activation="gelu", batch_first=True),
        torch.randn(2, 5, 16),
    )
    gradient = run_backward(model, (x,))[1]
    report = invact.patch(model, (x,))
    assert [site.path for site in report.inverted] == ["_ff_block:gelu"]
    assert isinstance(model.dropout, FusedDropout)
    assert (run_backward(model, (x,))[1] - gradient).norm() < 1e-5 * gradient.norm()


def test_a_dropout_that_others_use_as_well_is_not_fused():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.drop, self.b = nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16)

        def forward(self, x):
            return self.drop(self.b(self.drop(self.act(self.a(x)))))

    (site,) = invact.plan(Shares(), (torch.randn(4, 16),)).sites
    assert site.action == "keep"


def test_a_dropout_whose_output_is_changed_in_place_is_not_fused(run_backward):
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.3), nn.SiLU(inplace=True))
    x = torch.randn(4, 16)
    gradient = run_backward(model, (x,))[1]
    invact.patch(model, (x,))
    assert type(model[2]) is nn.Dropout
    assert (run_backward(model, (x,))[1] - gradient).norm() < 1e-4 * gradient.norm()


def test_another_use_of_the_output_than_the_one_planned_with_is_an_error_and_no_wrong_gradient():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.also = block(), False

        def forward(self, x):
            y = self.layers[1](self.layers[0](x))
            z = self.layers[3](self.layers[2](y))
            return z + y.mean() if self.also else z

    model, x = Changes(), torch.randn(4, 16)
    invact.patch(model, (x,))
    model(x).sum().backward()
    model.also = True
    with pytest.raises(RuntimeError, match="used in another place too"):
        model(x).sum().backward()


def test_it_compiles_to_the_stock_computation(run_backward):
    model, x = block(), torch.randn(8, 16)
    invact.patch(model, (x,))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradient = run_backward(compiled, (x,))[1]
    assert (run_backward(model, (x,))[1] - gradient).norm() < 1e-5 * gradient.norm()


def test_forward_mode_through_a_fused_dropout_says_that_it_is_not_supported():
    x = torch.randn(8, requires_grad=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"fused with a dropout is not supported.*unpatch"):
            dropped(announced(dual, CURVES["gelu"]), 0.3, training=True)
