"""What is derived lies as it lay: copies on the way, views of copies, parts of what is kept whole."""

import copy

import pytest
import torch
import torch.nn.functional as F
from odd_graphs import WIDTH, X, assert_alike, step
from torch import nn

import invact

pytestmark = pytest.mark.usefixtures("one_thread")


# --- layouts ------------------------------------------------------------------------------------------


COPIES = {
    "clone": lambda n: n.t().clone(),
    "contiguous": lambda n: n.t().contiguous(),
    "of a product": lambda n: (n.t() * 0.5).clone(),
    "of a part": lambda n: n.t()[1:].clone(),
    "of a chunk": lambda n: n.t().chunk(2)[0].clone(),
    "of an expanded one": lambda n: n.t().expand(2, WIDTH, WIDTH).clone()[0],
    "of a flipped one": lambda n: n.t().flip(0).clone(),
    "of a turned one": lambda n: torch.rot90(n).clone(),
    "of a dropped one": lambda n: F.dropout(n.t(), 0.3).clone(),
    "of a cast": lambda n: n.t().double().clone().float(),
    "of a copy": lambda n: n.t().clone().clone(),
    "part of a copy": lambda n: n.t().clone()[2:].clone(),
    "channels last": lambda n: n.view(4, 16, 8, 8).contiguous(memory_format=torch.channels_last).flatten(2)[0],
    "to channels last": lambda n: n.view(4, 16, 8, 8).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("of", COPIES)
def test_a_copy_on_the_way_lies_as_it_lay(of):
    def centred(m, x):
        u = COPIES[of](m.norm(m.first(x)))
        u = u - u.mean(1, keepdim=True)
        return m.last(u.reshape(-1, WIDTH)) + (u * u).sum()

    def by_its_mean_alone(m, x):
        u = COPIES[of](m.norm(m.first(x)))
        return m.last(m.norm(m.first(x)) - u.mean(-1, keepdim=True).mean())

    def copied_once_more(m, x):
        u = COPIES[of](m.norm(m.first(x)))
        return m.last((u - u.mean(-1, keepdim=True)).transpose(0, 1).clone().reshape(-1, WIDTH))

    def seed(train):
        def seeded(model):
            torch.manual_seed(1)
            train(model)

        return seeded

    for put_together in (centred, by_its_mean_alone, copied_once_more):
        assert_alike(put_together, seed(step))


def test_a_view_of_a_copy_that_only_another_layout_has():
    def put_together(m, x):
        h = m.norm(m.first(x))
        beside = (h.reshape(-1, 2) * m.last.weight.reshape(-1, 2)).sum()
        z = torch.view_as_complex(h.reshape(-1, 2).t().clone().t())
        return (z * torch.view_as_complex(m.first.weight.reshape(-1, 2))).abs().sum() + m.last(h).sum() + beside

    assert_alike(put_together)


def test_a_conjugate_that_is_resolved():
    def put_together(m, x):
        c = torch.fft.fft(m.norm(m.first(x))).conj()
        product = c * torch.complex(m.last.weight, m.first.weight)
        return torch.view_as_real(c.resolve_conj()).square().sum() + product.abs().sum()

    assert_alike(put_together)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_nested_and_sparse_tensors_are_kept_as_they_are():
    def nested(m, x):
        h = m.norm(m.first(x))
        return m.last(torch.nested.as_nested_tensor([h[:20], h[20:]]) * 0.5).to_padded_tensor(0.0)

    assert_alike(nested)
    assert_alike(lambda m, x: (m.last.weight.to_sparse_csr() * 0.5) @ m.norm(m.first(x)))

    def of_nested(model):
        rows = torch.nested.nested_tensor([X[:20], X[20:]])
        model(rows).to_padded_tensor(0.0).square().sum().backward()

    assert_alike(lambda m, x: m.last(m.norm(m.act(m.first(x)))), of_nested)


# --- parts of what is kept whole --------------------------------------------------------------------------


class Attention(nn.Module):
    """Keys and values in a cache that begins empty, or turned; what attention keeps first waits for the projection."""

    def __init__(self, put_together):
        super().__init__()
        torch.manual_seed(0)
        self.all, self.out, self.put_together = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), put_together

    def forward(self, x):
        parts = (part.view(2, WIDTH // 2, 4, WIDTH // 4).transpose(1, 2) for part in self.all(x).split(WIDTH, -1))
        attended = F.scaled_dot_product_attention(*self.put_together(*parts))
        return self.out(attended.transpose(1, 2).reshape(x.shape))


def turned(x):
    half = x.shape[-1] // 2
    angles = torch.linspace(0, 3, x.shape[-2]).unsqueeze(-1)
    return (x.float() * angles.cos() + torch.cat([-x[..., half:], x[..., :half]], -1) * angles.sin()).to(x.dtype)


def in_a_cache(q, k, v):
    empty = k.new_empty(0)
    return q, torch.cat([empty, k], -2), torch.cat([empty, v], -2)


@pytest.mark.parametrize(
    "put_together",
    [
        in_a_cache,
        lambda q, k, v: (turned(q), turned(k), v),
        lambda q, k, v: (q, torch.cat([k[:, :, :2], k], -2)[:, :, 2:], v),
        lambda q, k, v: (q.clone(), k.clone(), v.clone()),  # nothing is kept whole: three copies
    ],
    ids=["cached", "turned", "longer", "copied"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_that_are_parts_of_one_projection_are_made_again_from_it(put_together, dtype):
    from conftest import kept_bytes

    stock = Attention(put_together).to(dtype)
    ours, x = copy.deepcopy(stock), X.detach().view(2, WIDTH // 2, WIDTH).to(dtype, copy=True).requires_grad_()
    report = invact.patch(ours, (x,), exact=True)
    for model in (stock, ours):
        model(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
    # Besides: its input, what attention gives with its statistics, and the square.
    one = x.numel() * x.element_size()
    measured = kept_bytes(ours, (x,))
    assert measured == pytest.approx(report.bytes_after, rel=0.01)
    assert (measured - 2 * one) / one == pytest.approx(3, abs=0.3)


class WithAnEmptyOperand(nn.Module):
    """A cat whose empty operand has a dtype and a layout of its own, which are then those of what it gives."""

    def __init__(self, put_together):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.put_together = nn.Conv2d(16, 16, 3, padding=1), put_together

    def forward(self, x):
        h = self.conv(x)
        return self.put_together(h).sum() + torch.sin(h).sum()


def spread(c):
    return torch.exp(c - c.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "put_together",
    [
        lambda h: torch.cos(torch.cat([torch.empty(4, 0, 7, 7), h.bfloat16()], 1)),
        lambda h: spread(torch.cat([torch.empty(4, 0, 7, 7), h], 1)),
        lambda h: spread(torch.cat([h, torch.empty(4, 0, 7, 7)], 1)).float(),
    ],
    ids=["wider", "contiguous", "at the end"],
)
def test_an_empty_operand_of_a_cat_that_tells_how_it_lies_or_its_dtype(put_together):
    stock = WithAnEmptyOperand(put_together)
    ours, x = copy.deepcopy(stock), torch.randn(4, 16, 7, 7).to(memory_format=torch.channels_last)
    invact.patch(ours, (x,), exact=True)
    for model in (stock, ours):
        model(x).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(stock.parameters(), ours.parameters(), strict=True))


class Named(torch.autograd.Function):
    """Has, as some do, something of its own under `name`, where other nodes of the graph have a method."""

    @staticmethod
    def forward(ctx, x):
        ctx.name = "square"
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Squared(nn.Module):
    def forward(self, x):
        return Named.apply(x)


def test_a_function_with_a_name_of_its_own_trains_patched_and_is_fitted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), Squared(), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64))
    x = torch.randn(256, 64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    report = invact.fit(model, (x,), memory="64MiB")
    model(x).square().sum().backward()
    assert report.saving > 0
    assert 0 < report.peak_bytes <= 64 * 2**20
    for parameter, stock in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, stock, rtol=1e-4, atol=1e-4)
