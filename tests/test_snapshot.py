"""What a forward pass does to anything that can be reached from a model is undone by a snapshot."""

import array
import collections
import contextvars
import functools
import gc
import random
import sys
import threading
import time
import types
import weakref
from typing import ClassVar

import numpy
import pytest
import torch
from described import described
from objects_of_users import Frozen, Settings, Slotted, model_with
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_outputs import BaseModelOutput

import invact
from invact.snapshot.snapshot import Snapshot, as_it_was

COUNT = 0
SEEN = []
TABLE = {"a": [1]}


class Tracker:
    total = 0
    everywhere: ClassVar = []

    def __init__(self):
        self.values, self.last = [1, 2], None

    def see(self, value):
        Tracker.total += 1
        self.everywhere.append(value)
        self.values.append(value)
        self.last = value

    def __call__(self, value):
        SEEN.append(value)


FAR, CONTEXT = Tracker(), contextvars.ContextVar("CONTEXT", default=[])  # noqa: B039
OWN, WEAK = threading.local(), weakref.WeakKeyDictionary()


def counting_hook():
    count, seen = 0, []

    def hook(module, args, out):
        nonlocal count
        count += 1
        seen.append(out)

    hook(None, (), 1)
    return hook


def changed_defaults(x, history=[0], *, last={"x": 0}):  # noqa: B006
    history.append(x)
    last["x"] = x


# What a model has, and what a forward does to it.
CHANGES = {
    "a mapping that refuses": (Frozen(a=1), lambda v: dict.__setitem__(v, "b", 2)),
    "a mapping that refuses loses": (Frozen(a=1, b=2), lambda v: dict.__delitem__(v, "a")),
    "a ModelOutput": (BaseModelOutput(last_hidden_state=torch.ones(2)), lambda v: setattr(v, "attentions", (1,))),
    "an ordered dict's order": (collections.OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "an ordered dict's first": (collections.OrderedDict(a=1, b=2), lambda v: v.popitem(last=False)),
    "a dict's order": ({"a": 1, "b": 2}, lambda v: v.update(a=v.pop("a"))),
    "a dict emptied": ({"a": 1, "b": 2}, lambda v: v.clear()),
    "a defaultdict": (collections.defaultdict(list), lambda v: v["x"].append(1)),
    "a counter": (collections.Counter("abc"), lambda v: v.update("abz")),
    "a view of a mapping": (types.MappingProxyType(TABLE), lambda v: v["a"].append(2)),
    "a deque": (collections.deque([1, 2], maxlen=2), lambda v: v.append(3)),
    "a set": ({1, 2}, lambda v: (v.add(3), v.discard(1))),
    "a thread's own": (OWN, lambda v: setattr(v, "last", 1)),
    "what is weakly referred to": (weakref.ref(FAR), lambda v: v().see(5)),
    "a method weakly referred to": (weakref.WeakMethod(FAR.see), lambda v: v()(5)),
    "a context variable": (CONTEXT, lambda v: v.get().append(1)),
    "a sparse tensor": (torch.eye(2).to_sparse(), lambda v: v._values().add_(1)),
    "a compressed tensor": (torch.eye(2).to_sparse_csr(), lambda v: v.values().add_(1)),
    "a nested tensor": (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), lambda v: v[0].add_(1)),
    "a weak dictionary": (WEAK, lambda v: v.update({Tracker: [1]})),
    "a bytearray": (bytearray(b"ab"), lambda v: v.extend(b"c")),
    "an array": (array.array("d", [1, float("nan")]), lambda v: v.append(2)),
    "a list in a tuple in a dict": ({"a": ([1],)}, lambda v: v["a"][0].append(2)),
    "a list of a million": (list(range(10**6)), lambda v: v.append(1)),
    "a list that holds itself": ((lambda v: v.append(v) or v)([1]), lambda v: v.clear()),
    "a plain object": (Tracker(), lambda v: v.see(5)),
    "an object's attributes exchanged": (Tracker(), lambda v: setattr(v, "__dict__", {"values": 1})),
    "an object's class": (Tracker(), lambda v: setattr(v, "__class__", Other)),
    "slots": (Slotted(), lambda v: (v.value.append(2), setattr(v, "empty", 3))),
    "a slot emptied": (Slotted(), lambda v: delattr(v, "value")),
    "a frozen dataclass": (Settings(1.0, [1]), lambda v: (v.steps.append(2), object.__setattr__(v, "rate", 2.0))),
    "a numpy array": (numpy.array([1.0, numpy.nan]), lambda v: v.__iadd__(1)),
    "a numpy array of objects": (numpy.array([[1], {}], dtype=object), lambda v: v[0].append(2)),
    "a torch generator": (torch.Generator(), lambda v: torch.rand(2, generator=v)),
    "a Python generator of numbers": (random.Random(0), lambda v: v.random()),
    "a closure": (counting_hook(), lambda v: v(None, (), 2)),
    "defaults": (changed_defaults, lambda v: v(1)),
    "attributes of a function": (counting_hook(), lambda v: setattr(v, "calls", 1)),
    "a method": (Tracker().see, lambda v: v(1)),
    "a method of a list": ([1].append, lambda v: v(1)),
    "a partial": (functools.partial(Tracker().see, 1), lambda v: v()),
    "attributes of a plain tensor": (torch.zeros(2), lambda v: setattr(v, "note", [1])),
    "a tensor that asks for a gradient": (torch.zeros(2), lambda v: v.requires_grad_()),
    "a gradient": (torch.zeros(2, requires_grad=True), lambda v: setattr(v, "grad", torch.ones(2))),
    "a tensor's data": (torch.zeros(2), lambda v: setattr(v, "data", torch.ones(2))),
}


class Other(Tracker):
    pass


@pytest.mark.parametrize("kind", CHANGES)
def test_what_is_reached_by_an_attribute_is_put_back(kind):
    value, change = CHANGES[kind]
    model = model_with(held=value)
    before = described(model)
    with as_it_was(model):
        change(value)
        assert described(model) != before
    assert described(model) == before
    if isinstance(value, collections.OrderedDict):
        assert list(value) == list(dict(value.items()))


@pytest.mark.parametrize("kind", CHANGES)
def test_what_an_error_interrupts_is_put_back_as_well(kind):
    value, change = CHANGES[kind]
    model = model_with(held=value)
    before = described(model)

    def fails():
        with as_it_was(model):
            change(value)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert described(model) == before


def test_numpy_and_all_generators_of_random_numbers_are_put_back():
    own = numpy.random.default_rng(3), numpy.random.RandomState(3), numpy.random.PCG64(3)
    model = model_with(held=own)

    def drawn():
        return random.random(), numpy.random.rand(), torch.rand(1).item(), own[0].normal(), own[1].normal()

    with as_it_was(model):
        first = drawn()
    assert drawn() == first


def test_a_second_draw_that_numpy_has_in_store_is_put_back():
    numpy.random.seed(0)
    numpy.random.normal()  # draws two, keeps one
    with as_it_was(nn.Linear(1, 1)):
        first = numpy.random.normal(size=3).tolist()
    assert numpy.random.normal(size=3).tolist() == first


def test_attributes_classes_flags_and_hooks_of_modules_are_put_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    model[0].extra = 1
    before = described(model[0])
    with as_it_was(model):
        model(torch.zeros(2, 4))  # gives the lazy layer its shape and class
        model.eval()
        model[0].weight = nn.Parameter(torch.zeros(4, 4))
        model[0].register_forward_hook(print)
        model[0].register_buffer("more", torch.zeros(1))
        model.append(nn.ReLU())
        del model[0].extra
        assert type(model[1]) is nn.Linear
    assert described(model[0]) == before
    assert type(model[1]) is nn.LazyLinear
    assert nn.parameter.is_lazy(model[1].weight)
    assert len(model) == 2
    assert model.training
    assert model(torch.zeros(2, 4)).shape == (2, 3)  # as lazy as before


class Counting(nn.Module):
    calls = 0
    history: ClassVar = []
    tracker = Tracker()

    def forward(self, x):
        global COUNT
        COUNT += 1
        Counting.calls += 1
        Counting.late = 1
        self.history.append(x)
        self.tracker.see(x)
        TABLE["a"].append(x)
        settings_module.count += 1
        count_by_name(x)
        return x


def count_by_name(x):
    SEEN.append(x)
    Tracker.everywhere.append(x)
    globals()["TABLE"] = {}


settings_module = types.ModuleType("settings_of_a_user")
settings_module.count = 1


def test_what_hangs_on_a_module_of_ours_is_noted_as_well():
    seen, model = [], nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    invact.patch(model, (torch.zeros(2, 4),))
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    with as_it_was(model):
        model(torch.zeros(2, 4))
        assert len(seen) == 1
    assert seen == []


def test_globals_and_attributes_of_classes_are_put_back():
    table = TABLE

    def state():
        return COUNT, list(SEEN), {k: list(v) for k, v in table.items()}, Counting.calls, list(Counting.history), (
            vars(Tracker)["total"], list(Tracker.everywhere), settings_module.count,
        )  # fmt: skip

    model = nn.Sequential(nn.Linear(2, 2), Counting())
    before = state()
    with as_it_was(model):
        model(torch.zeros(1, 2))
        assert all(one != other for one, other in zip(state(), before, strict=True))
    assert state() == before
    assert TABLE is table
    assert "late" not in vars(Counting)


def test_a_global_that_was_not_there_goes_again(monkeypatch):
    def forward(x):
        global BRAND_NEW
        BRAND_NEW = x

    with as_it_was(model_with(hook=forward)):
        forward(1)
        assert "BRAND_NEW" in globals()
    assert "BRAND_NEW" not in globals()


def test_a_method_that_another_library_patches_meanwhile_stays(monkeypatch):
    def patched(self, x):
        return x

    monkeypatch.setattr(Counting, "forward", Counting.forward)
    with as_it_was(Counting()):
        Counting.forward = patched
    assert Counting.forward is patched


def test_plain_tensors_in_a_simulated_forward_are_what_they_were():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.log = torch.zeros(()), {"seen": [torch.ones(1)]}

        def forward(self, x):
            self.steps += 1
            self.log["seen"].append(x)
            self.log["seen"][0].add_(1)
            return x

    model = Steps()
    before = described(model)
    with as_it_was(model), FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.zeros(2))
    assert described(model) == before


def test_a_parameter_that_a_simulated_forward_really_changes_is_told():
    model = model_with()
    told = pytest.raises(RuntimeError, match="changed in place a parameter of shape")
    with told, as_it_was(model), torch.no_grad():
        model[0].weight.add_(1)


def test_numbers_in_tensors_are_put_back_on_request():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.counter = torch.tensor([float("nan"), 1.0])
    model.view = model[0].weight.detach()[0]
    named = [*model.state_dict(keep_vars=True).values(), model.counter, model.view]
    before = [tensor.tolist() for tensor in named]
    with as_it_was(model, tensors=True):
        model(torch.randn(4, 2))
        with torch.no_grad():
            model[0].weight.add_(1)
        model.counter += 1
        model.view.zero_()
    assert str([tensor.tolist() for tensor in named]) == str(before)  # nan is not equal to itself
    assert [*model.state_dict(keep_vars=True).values(), model.counter, model.view][0] is named[0]
    assert model[1].running_mean.tolist() == [0.0, 0.0]


def test_under_modes_that_change_what_tensors_do_the_same_is_noted():
    model = model_with(counter=torch.zeros(2), generator=torch.Generator())
    before = described(model)
    with torch.device("meta"), FakeTensorMode(allow_non_fake_inputs=True), as_it_was(model, tensors=True):
        torch.Tensor.data.__get__(model.counter)
        model.more = torch.zeros(2)
    assert described(model) == before


def test_what_did_not_change_is_not_written():
    class Watched(dict):
        pass

    written = []
    held = Watched(a=[1], b={2})
    model = model_with(held=held)
    snapshot = Snapshot(model)
    held["a"].append(2)
    patched = {name: getattr(dict, name) for name in ("__setitem__",)}
    Watched.__setitem__ = lambda self, *args: written.append(args) or patched["__setitem__"](self, *args)
    snapshot.put_back()
    assert held == {"a": [1], "b": {2}}
    assert written == []


def test_an_object_that_cannot_be_put_back_does_not_keep_the_others_from_it():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    array_held = numpy.zeros(2)
    model[0].array, model[1].log = array_held, [1]

    def change():
        with as_it_was(model):
            array_held[0] = 1
            array_held.flags.writeable = False
            model[1].log.append(2)
            model[0].more = 1

    with pytest.raises(ValueError, match="read-only"):
        change()
    assert model[1].log == [1]
    assert not hasattr(model[0], "more")


def test_locks_files_and_modules_are_left_alone(tmp_path):
    with (tmp_path / "log").open("w") as file:
        held = (threading.Lock(), file, sys, threading.current_thread())
        with as_it_was(model_with(held=held)):
            file.write("a line")
    assert (tmp_path / "log").read_text() == "a line"


def test_nothing_is_held_after_the_block():
    tracker = Tracker()
    model = model_with(held=tracker)
    with as_it_was(model):
        model.seen = (new := Tracker())
        gone = weakref.ref(new)
        del new
    assert gone() is None
    gone = weakref.ref(tracker)
    del tracker, model
    gc.collect()
    assert gone() is None


def test_a_model_of_a_thousand_modules_is_noted_and_put_back_in_no_time():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(333)))
    took = []
    for _ in range(3):
        began = time.perf_counter()
        snapshot = Snapshot(model)
        noted = time.perf_counter()
        snapshot.put_back()
        took.append((noted - began, time.perf_counter() - noted))
    assert min(first for first, _ in took) < 0.3
    assert min(second for _, second in took) < 0.2
