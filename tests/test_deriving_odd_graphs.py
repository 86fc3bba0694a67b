"""Graphs that few models have, each of which deriving once got wrong: it trains as in stock, or is left as it is."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import invact
from invact.deriving.searching import MOST_SEARCHED

WIDTH = 64
X = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("one_thread")


class Odd(nn.Module):
    """Two linear layers with a norm, a batch norm and a parameter at hand, put together by `put_together`."""

    def __init__(self, put_together):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.batch_norm, self.act = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()
        self.image_norm = nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)
        self.scale = nn.Parameter(torch.randn(WIDTH) * 2)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1))
        self.put_together = put_together

    def forward(self, x):
        return self.put_together(self, x)


def step(model):
    model(X).square().sum().backward()


def gradients(model, train):
    train(model)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_alike(put_together, train=step):
    stock = Odd(put_together)
    ours = copy.deepcopy(stock)
    invact.patch(ours, (X,), exact=True)
    expected, found = gradients(stock, train), gradients(ours, train)
    assert expected.keys() == found.keys()
    assert [name for name, gradient in expected.items() if not torch.equal(gradient, found[name])] == []


# --- values that are not what they were ------------------------------------------------------------------


def test_a_parameter_that_forward_changes_after_its_use():
    def put_together(m, x):
        y = m.norm(m.first(x)) + m.scale
        with torch.no_grad():
            m.scale.clamp_(-1, 1)
        return m.last(y)

    assert_alike(put_together)


def test_a_parameter_that_is_stepped_between_two_forward_passes_of_one_graph():
    def train(model):
        y = model(X)
        with torch.no_grad():
            model.scale.mul_(0.5)
        model(y).square().sum().backward()

    assert_alike(lambda m, x: m.norm(m.last(m.norm(m.first(x)))) + m.scale, train)


def test_an_input_that_is_changed_after_its_use():
    def train(model):
        x = X.clone().requires_grad_()
        z = x * 2
        with torch.no_grad():
            x.clamp_(-0.1, 0.1)
        model(z).square().sum().backward()

    assert_alike(lambda m, x: m.last(m.norm(m.first(x))), train)


def test_running_statistics_that_move_on_before_backward():
    def train(model):
        model.eval()
        y = model(X)
        model.train()
        model(X + 1)
        y.square().sum().backward()

    assert_alike(lambda m, x: m.last(m.batch_norm(m.first(x))), train)
    assert_alike(lambda m, x: m.last(m.image_norm(m.first(x)[None].mT).mT[0]), train)


# --- graphs that are deep or wide -------------------------------------------------------------------------


def deep_sum(m, x):
    v, h = m.last(m.norm(m.first(x))), x
    for _ in range(200):
        h = h + v * 0.1
    return m.last(h)


def deep_views(m, x):
    h = m.norm(m.first(x))
    for _ in range(200):
        h = h.view(-1, 2).view(WIDTH, WIDTH)
    return m.last(h)


def deep_products(m, x):
    h = m.first(x)
    for _ in range(300):
        h = h * 0.999
    return m.last(h)


def kept_views_of_views(m, x):
    h, total = m.norm(m.first(x)), 0
    for _ in range(100):
        h = h.view(-1, 2).view(WIDTH, WIDTH)
        total = total + (h * m.scale).sum()
    return m.last(h) + total


def butterflies(m, x):
    a, b = m.first(x).chunk(2)
    for _ in range(40):
        a, b = a + b, a - b
        a, b = a * 0.5, b * 0.5
    return m.last(m.norm(torch.cat([a, b])))


def rotations(m, x):
    h = m.first(x)
    for _ in range(40):
        h = torch.cat([h[1:], h[:1]])
    return m.last(m.norm(h))


@pytest.mark.parametrize("graph", [deep_sum, deep_views, deep_products, kept_views_of_views, butterflies, rotations])
def test_a_search_for_a_recipe_ends_soon_however_deep_or_wide_the_graph(graph):
    start = time.perf_counter()
    assert_alike(graph)
    assert time.perf_counter() - start < 30  # it took hours where it took time at all


def test_a_search_looks_at_few_operators(monkeypatch):
    looked_at = []
    for name in ("AddBackward0", "SubBackward0", "MulBackward0", "CatBackward0"):
        rule = invact.deriving.rules.registry.RULES[name]

        def counted(node, number, find, rule=rule):
            looked_at.append(node)
            return rule(node, number, find)

        monkeypatch.setitem(invact.deriving.rules.registry.RULES, name, counted)
    with invact.deriving.hooks.Deriving():
        h = (X * torch.ones((), requires_grad=True)) @ X
        a, b = h.chunk(2)
        for _ in range(30):
            a, b = a + b, a - b
        looked_at.clear()
        torch.cat([a, b]) @ X.requires_grad_()
    assert 0 < len(looked_at) <= 2 * MOST_SEARCHED + 4


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


# --- and the rest ---------------------------------------------------------------------------------------


def test_a_mean_over_all_there_is():
    assert_alike(lambda m, x: (lambda h: m.last(h - h.mean(dim=None, keepdim=True)))(m.norm(m.first(x))))


def test_modules_and_expressions_that_forward_maps_over():
    assert_alike(lambda m, x: m.last(torch.vmap(m.act)(m.first(x))))
    assert_alike(lambda m, x: m.last(torch.vmap(lambda row: F.silu(row) * row)(m.first(x))))


def test_a_mask_in_a_buffer_is_there_anyway(count_kept):
    stock = Odd(lambda m, x: m.last((m.first(x) @ x).masked_fill(m.mask, -1e9).softmax(-1)))
    ours = copy.deepcopy(stock)
    report = invact.patch(ours, (X,), exact=True)
    assert not [tensor for tensor in report.derived if "mask" in tensor.what]
    assert report.bytes_after == count_kept(ours, (X,)) <= count_kept(stock, (X,)) == report.bytes_before


def test_a_mask_in_a_buffer_of_bytes_is_there_as_well(count_kept):
    stock = Odd(lambda m, x: m.last((m.first(x) @ x).masked_fill(m.bytes.view(torch.bool), -1e9).softmax(-1)))
    stock.register_buffer("bytes", stock.mask.view(torch.uint8))
    report = invact.plan(stock, (X,), exact=True)
    assert report.bytes_after <= report.bytes_before == count_kept(stock, (X,))


@pytest.mark.parametrize("rows", [2, 4, 64, 512])
def test_copies_of_running_statistics_are_nothing_beside_what_they_make_again(rows):
    model = Odd(lambda m, x: m.last(m.batch_norm(m.first(x)))).eval()
    report = invact.plan(model, (torch.randn(rows, WIDTH),), exact=True)
    assert bool(report.derived) == (rows == 512)


def test_nothing_gathers_at_a_leaf():
    model = Odd(lambda m, x: m.last(m.norm(m.first(x) * (m.first.bias * 0.5))))
    invact.patch(model, (X,), exact=True)
    leaf = model.first.bias.expand(1, WIDTH).grad_fn.next_functions[0][0]
    for _ in range(3):
        step(model)
    assert not any(leaf.metadata.values())


@pytest.mark.parametrize("shown", [True, False])
def test_a_checkpointed_region_is_not_run_anew_by_looking_for_recipes(shown, monkeypatch):
    """PyTorch 2.8 and 2.9 give what a node keeps to whoever unpacks it alone."""
    runs = []

    def region(m, h):
        runs.append(torch.is_grad_enabled())
        return F.gelu(m.norm(h))

    def put_together(m, x):
        h = checkpoint(region, m, m.first(x), use_reentrant=False)
        return m.last(F.silu(h) * h)

    if not shown:
        for module in (invact.deriving.asking, invact.deriving.unpacking, invact.deriving.hooks):
            monkeypatch.setattr(module, "shows_what_is_kept", False)
    model = Odd(put_together)
    invact.patch(model, (X,), exact=True)
    runs.clear()
    loss = model(X).sum()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2
    assert_alike(put_together)


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
