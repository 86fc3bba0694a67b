"""Rules of others for operators that have none: registered, used, and taken out again."""

import doctest
import re

import pytest
import torch
from torch import nn

import invact
from invact.deriving.handles import Derived, Kept
from invact.deriving.hooks import Deriving
from invact.deriving.rules import registry
from invact.deriving.rules.operands import derived, operand, produced
from invact.deriving.rules.pointwise import pointwise
from invact.deriving.rules.registry import RULES, VIEWS, register, unregister
from invact.deriving.saved_by_node import kept_by

ENTROPY = "SpecialEntrBackward0"


@pytest.fixture(autouse=True)
def _rules_as_before():
    before, views = dict(RULES), set(VIEWS)
    yield
    for rules, earlier in ((RULES, before), (VIEWS, views)):
        rules.clear()
        rules.update(earlier)


def kept_of(operator):
    """What is kept of an operator's output, and the gradients of a loss that wants it."""
    torch.manual_seed(0)
    x = torch.rand(64, 64, requires_grad=True)
    y = operator(x * 1.0)
    square = y * y
    handle = kept_by(square.grad_fn, "self")
    return handle, *torch.autograd.grad(square.sum(), x)


def test_an_operator_is_derived_once_it_has_a_rule_and_kept_again_once_it_is_taken_out():
    _, stock = kept_of(torch.special.entr)
    assert register(ENTROPY)(rule := pointwise(torch.special.entr)) is rule
    with Deriving():
        handle, gradient = kept_of(torch.special.entr)
    assert isinstance(handle, Derived)
    assert torch.equal(gradient, stock)
    unregister(ENTROPY)
    with Deriving():
        handle, gradient = kept_of(torch.special.entr)
    assert type(handle) is Kept
    assert torch.equal(gradient, stock)


def test_a_graph_that_was_recorded_with_a_rule_runs_without_it():
    register(ENTROPY)(pointwise(torch.special.entr))
    x = torch.rand(64, 64, requires_grad=True)
    with Deriving():
        loss = torch.special.entr(x).square().sum()
    unregister(ENTROPY)
    loss.backward()
    (stock,) = torch.autograd.grad(torch.special.entr(x).square().sum(), x)
    assert torch.equal(x.grad, stock)


class Doubled(torch.autograd.Function):
    """An operator of somebody's own, which keeps nothing."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_a_function_in_python_is_made_again_from_what_its_producer_gave():
    _, stock = kept_of(lambda x: Doubled.apply(x.exp()))
    with Deriving():
        assert type(kept_of(lambda x: Doubled.apply(x.exp()))[0]) is Kept

    @register("DoubledBackward")
    def doubled(node, number, find):
        return derived(lambda x: x * 2, produced(node, 0, find))

    with Deriving():
        handle, gradient = kept_of(lambda x: Doubled.apply(x.exp()))
    assert isinstance(handle, Derived)
    assert torch.equal(gradient, stock)


def test_a_report_tells_what_a_registered_rule_saves():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

        def forward(self, x):
            return self.down(torch.special.entr(self.up(x)))

    x = torch.rand(32, 64)
    before = invact.plan(Model(), (x,))
    register(ENTROPY)(pointwise(torch.special.entr))
    after = invact.plan(Model(), (x,))
    assert before.derived == []
    assert [each.bytes_saved for each in after.derived] == [32 * 256 * 4]
    assert before.bytes_after - after.bytes_after == 32 * 256 * 4


def test_a_view_that_is_registered_among_views_is_one_until_it_is_taken_out():
    register("SomeViewBackward0", among=VIEWS)(lambda node, number, find: None)
    assert "SomeViewBackward0" in VIEWS
    unregister("SomeViewBackward0")
    assert "SomeViewBackward0" not in VIEWS


def test_a_second_rule_for_an_operator_is_refused_and_the_first_stays():
    silu = RULES["SiluBackward0"]
    message = (
        "SiluBackward0 has a rule already, from invact.deriving.rules.pointwise, and can not have two. "
        'To put yours in its place, call unregister("SiluBackward0") first.'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        register(ENTROPY, "SiluBackward0")(pointwise(torch.special.entr))
    assert RULES["SiluBackward0"] is silu
    assert ENTROPY not in RULES  # nor is any other of the same call registered


def test_a_decorator_without_its_parentheses_is_refused():
    with pytest.raises(TypeError, match=r'^A rule stands under the name of a node, .* @register\("SiluBackward0"\)\.$'):

        @register
        def entropy(node, number, find):
            return derived(torch.special.entr, operand(node, "self", 0, find))


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"^A rule is a function of a node, and 3 is none\."):
        register(ENTROPY)(3)
    assert ENTROPY not in RULES


@pytest.mark.parametrize("call", [register, unregister])
def test_no_name_is_refused(call):
    with pytest.raises(ValueError, match="none was given"):
        call()


def test_what_was_not_registered_can_not_be_taken_out_nor_what_was_named_with_it():
    with pytest.raises(ValueError, match=f"^{ENTROPY} has no rule that could be taken out"):
        unregister("SiluBackward0", ENTROPY)
    assert "SiluBackward0" in RULES


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(registry)
    assert (result.failed, result.attempted > 5) == (0, True)
