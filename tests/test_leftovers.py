"""Simulated tensors that outlive a probe are found, and who holds them is named."""

import collections
import functools
import gc
import sys
import time
import types
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from invact.ledger.ledger import Ledger
from invact.simulation.leftovers import LeftoverError, check_no_leftovers

pytestmark = pytest.mark.usefixtures("all_objects_followed_meanwhile")

SEEN = []
LAST = None


class Tracker:
    kept = None

    def __init__(self):
        self.last, self.history = None, []


class Slotted:
    __slots__ = ("value",)


class Model(nn.Module):
    pass


def simulated():
    mode = FakeTensorMode()
    with mode:
        return mode, torch.zeros(3)


def hook_with(seen):
    def hook(module, args, out):
        seen.append(out)

    return hook


def defaults(x, kept=[]):  # noqa: B006
    kept.append(x)


def generator_of(x):
    yield
    yield x


TRACKER, SLOTTED, MODEL = Tracker(), Slotted(), Model()
HOOK = hook_with([])
DEQUE = collections.deque()
GENERATORS = []
BY_OBJECT = weakref.WeakKeyDictionary()
OUTSIDE = types.ModuleType("code_of_a_user")
sys.modules["code_of_a_user"] = OUTSIDE


def started(x):
    generator = generator_of(x)
    next(generator)
    GENERATORS.append(generator)


PLACES = {
    "a list in the global `SEEN` of module": (lambda x: SEEN.append(x), lambda: SEEN.clear()),
    "a tuple in a list in the global `SEEN` of module": (lambda x: SEEN.append((x,)), lambda: SEEN.clear()),
    "a dict in a list in the global `SEEN` of module": (lambda x: SEEN.append({"x": x}), lambda: SEEN.clear()),
    "a deque in the global `DEQUE` of module": (lambda x: DEQUE.append(x), lambda: DEQUE.clear()),
    "the global `LAST` of module `code_of_a_user`": (
        lambda x: setattr(OUTSIDE, "LAST", x),
        lambda: delattr(OUTSIDE, "LAST"),
    ),
    "attribute `last` of an object of class `": (lambda x: setattr(TRACKER, "last", x), TRACKER.__init__),
    "a list in attribute `history` of an object of class `": (lambda x: TRACKER.history.append(x), TRACKER.__init__),
    "attribute `value` of an object of class `": (
        lambda x: setattr(SLOTTED, "value", x),
        lambda: delattr(SLOTTED, "value"),
    ),
    "attribute `seen` of the module of class `": (lambda x: setattr(MODEL, "seen", x), lambda: delattr(MODEL, "seen")),
    "attribute `kept` of class `": (lambda x: setattr(Tracker, "kept", x), lambda: setattr(Tracker, "kept", None)),
    "a list in closure variable `seen` of function `": (
        lambda x: HOOK(None, (), x),
        lambda: HOOK.__closure__[0].cell_contents.clear(),
    ),
    "a list in a tuple in defaults or attributes of function `defaults` (": (defaults, defaults.__defaults__[0].clear),
    "a dict in a WeakKeyDictionary in the global `BY_OBJECT` of module": (
        lambda x: BY_OBJECT.update({TRACKER: x}),
        lambda: BY_OBJECT.clear(),
    ),
    "local variables of function `generator_of` (": (started, GENERATORS.clear),
}


# Each takes a search through all objects of the process, seconds where everything is loaded: one of a kind in each run.
IN_EACH_RUN = (
    "a list in attribute `history` of an object of class `",
    "attribute `seen` of the module of class `",
    "a list in closure variable `seen` of function `",
    "a dict in a WeakKeyDictionary in the global `BY_OBJECT` of module",
)


@pytest.mark.parametrize(
    "words", [words if words in IN_EACH_RUN else pytest.param(words, marks=pytest.mark.slow) for words in PLACES]
)
def test_who_holds_a_simulated_tensor_is_named(words):
    hold, empty = PLACES[words]
    mode, tensor = simulated()
    try:
        hold(tensor)
        del tensor
        with pytest.raises(LeftoverError) as error:
            check_no_leftovers(mode)
        assert words in str(error.value)
        assert "1 of them is still held by" in str(error.value)
    finally:
        empty()
    del error
    check_no_leftovers(mode)  # not even the error holds it


def test_several_holders_are_named_together():
    mode, tensor = simulated()
    SEEN.append(tensor)
    with mode:
        TRACKER.last = torch.ones(2)
    del tensor
    try:
        with pytest.raises(LeftoverError, match=r"2 of them are still held by .* and by ") as error:
            check_no_leftovers(mode)
        assert "`SEEN`" in str(error.value)
        assert "`last`" in str(error.value)
    finally:
        SEEN.clear()
        TRACKER.last = None


@pytest.mark.parametrize("size", [None, 8])
def test_a_cache_of_functools_is_emptied(size):
    @functools.lru_cache(maxsize=size)
    def cached(x):
        return [x, (x.cos(),)]

    mode, tensor = simulated()
    with mode:
        cached(tensor)
    del tensor
    check_no_leftovers(mode)
    assert cached.cache_info().currsize == 0


def test_a_dead_cycle_is_no_leftover():
    mode, tensor = simulated()
    cycle = [tensor]
    cycle.append(cycle)
    del tensor, cycle
    check_no_leftovers(mode)


def test_tensors_of_another_simulation_are_not_ours():
    mode, tensor = simulated()
    other, kept = simulated()
    del tensor
    check_no_leftovers(mode)
    assert type(kept).__name__ == "FakeTensor"
    del other


def test_a_forward_and_a_graph_leave_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {name: mode.from_tensor(p).requires_grad_() for name, p in model.named_parameters()}
        out = torch.func.functional_call(model, weights, (torch.zeros(2, 4),))
    del weights, out
    check_no_leftovers(mode)


def test_looking_takes_no_time_where_nothing_is_left():
    import transformers  # noqa: F401  (half a million objects)

    mode, tensor = simulated()
    del tensor
    gc.collect()
    took = []
    for _ in range(3):
        began = time.perf_counter()
        check_no_leftovers(mode)
        took.append(time.perf_counter() - began)
    assert min(took) < 0.3


def test_a_result_whose_graph_lives_on_is_told_by_who_holds_the_result():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Ledger(model):
        weights = {name: mode.from_tensor(p).requires_grad_() for name, p in model.named_parameters()}
        TRACKER.last = torch.func.functional_call(model, weights, (torch.zeros(2, 4),))
    del weights
    try:
        with pytest.raises(LeftoverError) as error:
            check_no_leftovers(mode)
    finally:
        TRACKER.last = None
    assert "held by attribute `last` of an object of class" in str(error.value)
    assert "invact." not in str(error.value)
    del error
    check_no_leftovers(mode)
