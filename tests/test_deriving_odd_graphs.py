"""Graphs that few models have, each of which deriving once got wrong: it trains as in stock, or is left as it is."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from odd_graphs import WIDTH, Odd, X, assert_alike, step
from torch.utils.checkpoint import checkpoint

import invact
from invact.deriving.searching import MOST_SEARCHED

pytestmark = pytest.mark.usefixtures("one_thread")


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
        for module in (invact.deriving.saved_by_node, invact.deriving.unpacking, invact.deriving.hooks):
            monkeypatch.setattr(module, "shows_what_is_kept", False)
    model = Odd(put_together)
    invact.patch(model, (X,), exact=True)
    runs.clear()
    loss = model(X).sum()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2
    assert_alike(put_together)
