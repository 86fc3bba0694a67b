"""What is derived is right though tensors are changed in place, with autograd's leave, without it, or by functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from deriving_twins import WIDTH, Net, Normed, X, assert_alike, assert_left_alone, gradients, step, twins
from torch import nn

import invact

pytestmark = pytest.mark.usefixtures("one_thread")


# --- changed in place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [lambda m: m.x, lambda m: m.norm.weight, lambda m: m.last.weight], ids=["source", "norm", "linear"]
)
def test_what_stock_refuses_is_refused_with_its_words(changed):
    for model in twins(Normed()):
        loss = model(X).square().mean()
        with torch.no_grad():
            changed(model).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_was_derived_may_be_changed_afterwards_and_its_gradient_stays_right():
    """Stock refuses this, since it keeps the tensor; nobody here needs what it holds now."""
    stock, ours = twins(Normed())
    expected = gradients(stock, step)
    loss = ours(X).square().mean()
    with torch.no_grad():
        ours.h.mul_(2)
    loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in ours.named_parameters())


def test_a_weight_changed_between_forward_and_backward_under_autocast_as_stock_allows_it():
    stock, ours = twins(Net())

    def train(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).float().square().mean()
        with torch.no_grad():
            for layer in (model.first, model.last):
                layer.weight.mul_(2)
        loss.backward()
        with torch.no_grad():
            for layer in (model.first, model.last):
                layer.weight.div_(2)

    assert_alike(stock, ours, train)


def _no_grad(h):
    with torch.no_grad():
        h[:, ::2].mul_(2)


CHANGES = {"no_grad": _no_grad, "data": lambda h: h.data.mul_(2), "detach": lambda h: h.detach().mul_(2)}
READS = {
    "itself": lambda h: h,
    "step": lambda h: h * 1.5,
    "cast": lambda h: h.to(torch.bfloat16).to(torch.float32),
    "in place": lambda h: F.relu(h, inplace=True),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_autograd_does_not_see_stops_deriving(change, read):
    def between(h):
        CHANGES[change](h)
        return READS[read](h)

    assert_left_alone(Normed(between), "does not see it")


def test_changes_that_autograd_records_are_derived_across():
    def between(h):
        gate = (h * 1.5).add_(1).mul_(2)
        whole = torch.zeros_like(h)
        whole[:1], whole[1:] = gate[:1], gate[1:]
        whole += h
        return whole * F.silu(gate)

    assert_alike(*twins(Normed(between)))


def test_convolutions_with_everything_in_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            for convolution, norm in zip(self.convolutions, self.norms, strict=True):
                y = norm(convolution(x))
                y += x
                x = F.silu(norm(convolution(F.relu(y, inplace=True))), inplace=True)
            return self.convolutions[0](x)

    images = torch.randn(2, 4, 16, 16)
    stock, ours = twins(Residual(), (images,))
    assert_alike(stock, ours, lambda model: model(images).square().mean().backward())
    for expected, found in zip(stock.buffers(), ours.buffers(), strict=True):
        assert torch.equal(expected, found)


# --- functions of others that write ---------------------------------------------------------------------


class Overwriting(torch.autograd.Function):
    """Its backward writes over what it kept, as those of Unsloth and Liger do in kernels that autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = gradient * x.cos()
        x.detach().numpy()[...] = 7
        return slope


class OverwritingByOperators(Overwriting):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = gradient * x.cos()
        x.mul_(0)
        return slope


# Such that in stock PyTorch nobody reads afterwards what is written into.
USES = {
    "norm before": lambda m, x, write: write(m.norm(x)) + m.last(m.norm(x)),
    "norm after": lambda m, x, write: m.last(m.norm(x) * 1.5) + write(m.norm(x)),
    "shared norm": lambda m, x, write: (lambda h: m.last(write(h)) + m.second(h))(m.norm(x)),
    "residual": lambda m, x, write: (lambda h: m.last(m.norm(h * 2)) + m.second(write(h)))(m.first(x)),
    "gate": lambda m, x, write: (lambda g: m.second(write(F.silu(g)) * m.last(x)) + m.last(F.silu(g)))(m.first(x)),
}


@pytest.mark.parametrize("function", [Overwriting, OverwritingByOperators])
@pytest.mark.parametrize("use", USES)
def test_functions_that_write_into_what_they_keep(use, function):
    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            return USES[use](self, self.first(x), function.apply)

    assert_alike(*twins(Using()))


def test_a_recipe_reads_what_a_function_has_kept_and_written_into():
    """In stock PyTorch the function alone keeps the tensor, and may do with it what it likes."""

    class Two(Normed):
        def forward(self, x):
            h = self.first(x)
            return Overwriting.apply(h), self.last(self.norm(h * 2)), h

    def train(model):
        written, other, h = model(X)
        torch.autograd.grad(written.sum(), h)
        other.square().mean().backward()

    assert_alike(*twins(Two()), train)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_functions_that_change_what_they_are_given():
    stock = Normed(lambda h: F.silu(Doubled.apply(h)))
    ours = copy.deepcopy(stock)
    invact.patch(ours, (X,), exact=True)
    assert_alike(stock, ours)


class Scaled(torch.autograd.Function):
    """Reads an attribute of a tensor that it kept, and keeps a sparse one."""

    @staticmethod
    def forward(ctx, x, scale, matrix):
        ctx.save_for_backward(scale, matrix)
        return torch.sparse.mm(matrix, x) * scale.factor

    @staticmethod
    def backward(ctx, gradient):
        scale, matrix = ctx.saved_tensors
        return torch.sparse.mm(matrix.t(), gradient * scale.factor), None, None


def test_functions_that_keep_tensors_of_other_kinds():
    class Scaling(Normed):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)

        def forward(self, x):
            self.scale.factor = 3.0
            matrix = torch.eye(WIDTH).to_sparse()
            return super().forward(Scaled.apply(self.first(x), self.scale, matrix))

    x = torch.randn(WIDTH, WIDTH)
    stock, ours = twins(Scaling(), (x,))
    assert_alike(stock, ours, lambda model: model(x).square().mean().backward())
