"""Models as strangers have them: what their forward and hooks touch is untouched after a probe, or is told."""

import collections
import contextvars
import copy
import ctypes
import functools
import itertools
import queue
import random
import sys
import threading
import types
import weakref

import numpy
import pytest
import torch
from described import described
from torch import nn

import invact
from invact.simulation.leftovers import LeftoverError
from invact.snapshot.snapshot import as_it_was
from invact.swapping.patched import Patched

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

# A module of the user's that the model's code imports.
THIRD = types.ModuleType("helpers_of_a_stranger")
exec(
    """
count, cache, kept = 0, {}, []

def tick():
    global count
    count += 1

def frequencies(shape, device):
    import torch
    if (shape, device) not in cache:
        cache[shape, device] = torch.arange(shape[-1], device=device)
    return cache[shape, device]

def make():
    seen = []
    def see(value):
        seen.append(value)
    return see, seen

see, seen = make()
""",
    vars(THIRD),
)
sys.modules[THIRD.__name__] = THIRD


class Frozen(dict):
    def _refuse(self, *args, **kwargs):
        raise TypeError("frozen")

    __setitem__ = update = clear = pop = _refuse


class Registers(type):
    known: list = []  # noqa: RUF012


class Tracker(metaclass=Registers):
    total = 0
    by_name: dict = {}  # noqa: RUF012

    def __init__(self):
        self.values, self.nested = [], {"a": ({"b": collections.deque(maxlen=2)},)}

    def see(self, value):
        Tracker.total += 1
        Registers.known.append(value)
        self.by_name[len(self.by_name)] = value
        self.values.append(value)
        self.nested["a"][0]["b"].append(value)


GLOBAL, TOTAL, TRACKER = [], 0, Tracker()
OWN, CONTEXT = threading.local(), contextvars.ContextVar("CONTEXT")
OWN.seen = []
CONTEXT.set([])
BY_MODULE, BY_NUMBER = weakref.WeakKeyDictionary(), weakref.WeakValueDictionary()
RANDOM, NUMBERS, GENERATOR = random.Random(0), numpy.random.default_rng(0), torch.Generator()


@functools.cache
def rotary(length, device):
    return torch.arange(length, device=device).float()


def add_to_a_global(model, x):
    global TOTAL
    TOTAL += 1
    GLOBAL.append(x)
    globals()["GLOBAL"] = [*GLOBAL, x]


def draw(model, x):
    random.random(), numpy.random.rand(), torch.rand(1), RANDOM.random(), NUMBERS.normal()
    torch.rand(1, generator=GENERATOR)


def count_in_plain_tensors(model, x):
    model.steps += 1
    model.numbers += 1
    model.table[0]["seen"].add_(1)


def keep_in_a_context(model, x):
    CONTEXT.get().append(x)
    CONTEXT.set([x])


TOUCHES = {
    "globals": add_to_a_global,
    "an imported module's counter": lambda model, x: THIRD.tick(),
    "an imported module's closure": lambda model, x: THIRD.see(x),
    "a cache by shape and device": lambda model, x: THIRD.frequencies(x.shape, x.device),
    "functools.lru_cache": lambda model, x: rotary(x.shape[-1], x.device),
    "classes and their metaclass": lambda model, x: TRACKER.see(x),
    "a thread's own": lambda model, x: (OWN.seen.append(x), setattr(OWN, "last", x)),
    "context variables": keep_in_a_context,
    "weak dictionaries": lambda model, x: (BY_MODULE.update({model: [x]}), BY_NUMBER.update({1: x})),
    "what is random": draw,
    "plain tensors and arrays": count_in_plain_tensors,
    "a mapping that refuses": lambda model, x: dict.__setitem__(model.config, "x", x),
    "its own modules": lambda model, x: (
        model.eval(),
        setattr(model, "extra", nn.Linear(1, 1)),
        model.requires_grad_(),
    ),
    "hooks": lambda model, x: model.act.register_forward_hook(print),
}


class Strange(nn.Module):
    def __init__(self, touch, ends=None, branches=False):
        super().__init__()
        self.up, self.act, self.norm, self.down = nn.Linear(8, 16), nn.GELU(), nn.BatchNorm1d(16), nn.Linear(16, 8)
        self.steps, self.numbers, self.table = torch.zeros(()), numpy.zeros(2), [{"seen": torch.ones(1)}]
        self.config, self.touch, self.ends, self.branches = Frozen(a=1), touch, ends, branches

    def forward(self, x):
        self.touch(self, x)
        y = self.norm(self.act(self.up(x)))
        if self.branches and y.sum().item() > 1e9:
            return x
        self.last = y
        if self.ends is not None:
            raise self.ends("theirs")
        return self.down(y)


def everything(model):
    """What there is besides the model, too."""
    own = [RANDOM, GENERATOR, OWN, CONTEXT, BY_MODULE.data, BY_NUMBER.data]
    of_classes = [TRACKER, Tracker.by_name, Registers.known]
    third = [value for name, value in vars(THIRD).items() if not name.startswith("__")]
    seen = {}
    objects = [described(value, seen) for value in (model, GLOBAL, *own, *of_classes, *third)]
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    return objects, TOTAL, Tracker.total, rotary.cache_info().currsize, states, str(NUMBERS.bit_generator.state)


DOES = {
    "plan": lambda model: invact.plan(model, (X,)),
    "activation_memory": lambda model: invact.activation_memory(model, (X,)),
    "patch": lambda model: (invact.patch(model, (X,)), invact.unpatch(model)),
    "patched": lambda model: patched(model),
}


def patched(model):
    with invact.patched(model, (X,)):
        pass


@pytest.mark.parametrize("touched", TOUCHES)
def test_what_a_forward_touches_would_be_seen(touched):
    rotary.cache_clear()
    model = Strange(TOUCHES[touched])
    before = everything(model)
    with as_it_was(model):
        model(X)
        assert everything(model) != before


UNCACHED = [touched for touched in TOUCHES if touched != "functools.lru_cache"]


@pytest.mark.parametrize("branches", [False, True], ids=["simulated", "real"])
@pytest.mark.parametrize("touched", UNCACHED)
@pytest.mark.parametrize("do", DOES)
def test_what_a_forward_touches_is_as_it_was(do, touched, branches):
    model = Strange(TOUCHES[touched], branches=branches)
    before = everything(model)
    DOES[do](model)
    assert everything(model) == before


@pytest.mark.usefixtures("all_objects_followed")
@pytest.mark.parametrize("do", [pytest.param("activation_memory", marks=pytest.mark.slow), "patched"])
def test_a_cache_of_functools_is_emptied_of_what_was_simulated_and_keeps_what_is_real(do):
    for branches in (False, True):
        rotary.cache_clear()
        model = Strange(TOUCHES["functools.lru_cache"], branches=branches)
        before = everything(model)
        DOES[do](model)
        if branches:
            rotary.cache_clear()  # real numbers in a cache are right
        assert everything(model) == before


ENDS = [KeyboardInterrupt, TimeoutError, SystemExit]


@pytest.mark.parametrize("branches", [False, True], ids=["simulated", "real"])
@pytest.mark.parametrize(
    ("touched", "ends"), [*((each, ZeroDivisionError) for each in UNCACHED), *(("globals", kind) for kind in ENDS)]
)
def test_a_forward_that_ends_in_the_middle_leaves_nothing_behind(touched, ends, branches):
    model = Strange(TOUCHES[touched], ends, branches)
    before = everything(model)
    with pytest.raises(ends, match="theirs"):
        invact.patch(model, (X,))
    assert everything(model) == before


@pytest.mark.parametrize("x", [X[:, :3], X.long()], ids=["shape", "dtype"])
def test_wrong_inputs_leave_nothing_behind(x):
    model = Strange(TOUCHES["classes and their metaclass"])
    before = everything(model)
    with pytest.raises(RuntimeError):
        invact.patch(model, (x,))
    assert everything(model) == before


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(8), lambda: nn.LazyBatchNorm1d(), lambda: nn.LazyConv1d(4, 1)])
def test_a_lazy_layer_stays_as_lazy_as_it_was(make):
    model = nn.Sequential(nn.Linear(8, 8), make(), nn.GELU())
    kind = type(model[1])
    with pytest.raises(ValueError, match=r"has no shape yet.*run the model once on real inputs first"):
        invact.patch(model, (X,))
    assert type(model[1]) is kind
    assert model[1].has_uninitialized_params()


def test_an_iterator_of_the_standard_library_goes_on_as_it_should():
    turns = itertools.cycle([[1], [2], [3]])
    model = Strange(lambda model, x: next(turns).append(x))
    invact.patch(model, (X,))
    assert sorted(next(turns)[0] for _ in range(3)) == [1, 2, 3]
    assert [len(next(turns)) for _ in range(3)] == [1, 1, 1]


# --- what outlives the probe where nothing reaches it ---------------------------------------------------


class Worker:
    """A thread with a list of its own."""

    def __init__(self):
        self.inbox, self.taken = queue.SimpleQueue(), queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, args=(self.inbox, self.taken), daemon=True)
        self.thread.start()

    @staticmethod
    def _work(inbox, taken):
        mine = []
        while (value := inbox.get()) is not None:
            mine.append(value)
            taken.put(len(mine))

    def keep(self, value):
        self.inbox.put(value)
        self.taken.get()


def in_a_queue():
    values = queue.Queue()
    return values.put, "a deque in attribute `queue` of an object of class `queue.Queue`"


def in_a_simple_queue():
    return queue.SimpleQueue().put, "held by "


def in_an_object_of_c():
    box = ctypes.py_object()
    return lambda value: setattr(box, "value", value), "attribute `_objects` of an object of class `ctypes.py_object`"


def in_another_thread():
    return Worker().keep, "local variable `mine` of function `Worker._work` ("


def in_a_library():
    return lambda value: setattr(
        nn.functional, "kept_by_a_stranger", value
    ), "the global `kept_by_a_stranger` of module"


HOLDERS = [in_a_queue, in_a_simple_queue, in_an_object_of_c, in_another_thread, in_a_library]


@pytest.mark.usefixtures("all_objects_followed")
@pytest.mark.parametrize(
    ("make", "do"),
    [*((make, "patch") for make in HOLDERS), *((in_a_queue, do) for do in DOES if do != "patch")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_who_holds_a_simulated_tensor_is_named_before_anything_is_patched(make, do):
    keep, words = make()
    model = Strange(lambda model, x: None)
    model.act.register_forward_hook(lambda m, args, out: (keep(out), None)[1])
    before = copy.deepcopy(model.state_dict())
    try:
        with pytest.raises(LeftoverError) as error:
            DOES[do](model)
        assert words in str(error.value)
        assert "Nothing was patched. Empty that, or take out the code that puts them there" in str(error.value)
    finally:
        vars(nn.functional).pop("kept_by_a_stranger", None)
    assert not any(isinstance(module, Patched) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
