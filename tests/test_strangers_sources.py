"""Methods of every shape, from files and notebooks: what runs after patching does what the source that runs says."""

import ast
import copy
import functools
import importlib.util
import linecache
import re
import sys
import traceback
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import invact

HEAD = """
import contextlib, functools
import torch
from torch import nn
from torch.nn import functional as F

SLOPE = 0.2

class Other:
    slope = 0.9

class Fake:
    gelu = staticmethod(lambda x: 3 * x)

def doubled(method):
    @functools.wraps(method)
    def wrapper(self, x):
        return 2 * method(self, x)
    return wrapper

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.slope, self.calls, self.shapes = 0.2, 0, []

class Mixin:
    def feed(self, x):
        return self.down(F.gelu(self.up(x)))

class Block(Base, Mixin):
"""


def in_a_file(text, folder, name):
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_a_notebook(text, folder, name):
    module, filename = types.ModuleType(name), f"<cell of {name} in {folder}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    exec(compile(text, filename, "exec"), module.__dict__)
    return module


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A module with `Block`, whose body is given."""

    def make(body, where=in_a_file):
        name = f"strangers_{tmp_path.name}"
        indented = "".join(f"    {line}\n" for line in body.strip("\n").split("\n"))
        module = where(HEAD + indented, tmp_path, name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return make


@pytest.fixture
def x():
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


# By what is in them, with how many sites are inverted: the body of a class.
BODIES = r"""
## nothing odd: 1
def forward(self, x): return self.down(F.gelu(self.up(x)))

## walrus in the value: 1
def forward(self, x): return self.down(F.gelu(y := self.up(x))) + y.mean()

## walrus around: 1
def forward(self, x): return self.down(y := F.gelu(self.up(x))) + y.mean()

## condition: 1
def forward(self, x): return self.down(F.gelu(self.up(x)) if self.training else x)

## comprehension: 1
def forward(self, x): return sum([self.down(F.gelu(self.up(x))) for _ in range(2)])

## generator: 1
def forward(self, x): return sum(self.down(F.gelu(self.up(x))) for _ in range(2))

## lambda: 1
def forward(self, x): return self.down((lambda h: F.gelu(h))(self.up(x)))

## several lines: 1
def forward(self, x):
    return self.down(
        F.gelu(
            self.up(x)  # up
        )
    )

## string of several lines: 1
def forward(self, x):
    s = '''a
   b
'''
    return len(s) * self.down(F.gelu(self.up(x)))

## f-string: 1
def forward(self, x):
    h = self.up(x)
    f'{F.gelu(h).sum():.2f}'
    return self.down(F.gelu(h))

## deleted: 1
def forward(self, x):
    h = self.up(x)
    y = F.gelu(h)
    del h
    return self.down(y)

## finally: 1
def forward(self, x):
    try: return self.down(F.gelu(self.up(x)))
    finally: self.calls += 1

## counted: 1
def forward(self, x):
    self.calls += 1
    self.shapes.append(x.shape)
    return self.down(F.gelu(self.up(x)))

## with: 1
def forward(self, x):
    with contextlib.nullcontext(): return self.down(F.gelu(self.up(x)))

## another name for self: 1
def forward(me, x): return me.down(F.gelu(me.up(x)))

## annotations: 1
def forward(self, x: 'Any', *more: int, k: int = 3) -> 'Any': return self.down(F.gelu(self.up(x)))

## from a mixin: 1
def forward(self, x): return self.feed(x)

## method that yields: 1
def parts(self, x): yield self.down(F.gelu(self.up(x)))
def forward(self, x): return sum(self.parts(x))

## twice: 2
def forward(self, x): return self.down(F.gelu(self.up(self.down(F.gelu(self.up(x))))))

## decorated: 0
@doubled
def forward(self, x): return self.down(F.gelu(self.up(x)))

## name shadowed by a variable: 0
def forward(self, x):
    F = Fake
    return self.down(F.gelu(self.up(x)))

## name shadowed in a lambda: 0
def forward(self, x): return self.down((lambda F, h: F.gelu(h))(Fake, self.up(x)))

## name shadowed in a comprehension: 0
def forward(self, x): return sum([self.down(F.gelu(self.up(x))) for F in [Fake]])

## name shadowed in a class: 0
def forward(self, x):
    class C:
        F = Fake
        y = F.gelu(x)
    return self.down(F.gelu(self.up(x))) + C.y

## self exchanged: 0
def forward(self, x):
    down, h = self.down, self.up(x)
    self = Other
    return down(F.leaky_relu(h, self.slope))

## self of a function in it: 0
def forward(self, x):
    def leaky(self, h): return F.leaky_relu(h, self.slope)
    return self.down(leaky(Other, self.up(x)))

## attribute set in it: None
def forward(self, x):
    self.slope = 0.9
    return self.down(F.leaky_relu(self.up(x), self.slope))

## global set in it: None
def forward(self, x):
    global SLOPE
    SLOPE = 0.9
    return self.down(F.leaky_relu(self.up(x), SLOPE))

## mangled name: 0
__slope = 0.2
def forward(self, x): return self.down(F.leaky_relu(self.up(x), self.__slope))

## its own variables: 0
def forward(self, x):
    y = F.gelu(self.up(x))
    return self.down(y) * len(locals())

## coroutine: 0
async def feed(self, x): return self.down(F.gelu(self.up(x)))
def forward(self, x):
    try: self.feed(x).send(None)
    except StopIteration as end: return end.value

## lambda as method: 0
forward = lambda self, x: self.down(F.gelu(self.up(x)))
"""
BODIES = {
    name: (body, ast.literal_eval(inverted))
    for name, inverted, body in re.findall(r"^## (.+): (\w+)\n((?:(?!## ).*\n)+)", BODIES, re.MULTILINE)
}
PLAIN = BODIES["nothing odd"][0]


@pytest.mark.parametrize("where", [in_a_file, in_a_notebook])
@pytest.mark.parametrize("name", BODIES)
def test_a_method_of_any_shape_trains_as_stock_and_is_given_back(name, where, load, x, train_alike):
    body, inverted = BODIES[name]
    kind = load(body, where).Block
    stock, ours = kind(), kind()
    report = invact.patch(ours, (x,))
    assert inverted in (None, len(report.inverted))
    calls = stock.calls, ours.calls
    train_alike(stock, ours)
    train_alike(stock, ours)
    assert stock.calls - calls[0] == ours.calls - calls[1]
    invact.unpatch(ours)
    assert type(ours) is kind
    train_alike(stock, ours)


def test_code_defaults_and_methods_exchanged_after_patching_are_those_that_run(load, x, train_alike):
    kind = load(
        "def forward(self, x, factor=1.0, *, more=1.0): return self.down(F.gelu(self.up(x))) * factor * more"
    ).Block
    stock = kind()
    original, ours = kind.forward, copy.deepcopy(stock)
    assert invact.patch(ours, (x,)).inverted
    original.__defaults__ = (2.0,)
    train_alike(stock, ours)
    original.__kwdefaults__["more"] = 3.0
    train_alike(stock, ours)
    original.__kwdefaults__ = {"more": 5.0}
    train_alike(stock, ours)
    for other in (
        lambda self, x: 2 * original(self, x),
        functools.wraps(original)(lambda self, x: 3 * original(self, x)),
        functools.partialmethod(lambda self, k, x: k * original(self, x), 4),
    ):
        kind.forward = other
        train_alike(stock, ours)
        later = copy.deepcopy(stock)
        invact.patch(later, (x,))
        train_alike(stock, later)
    kind.forward = original
    original.__code__ = (lambda self, x, k=1.0, *, more=1.0: self.down(self.up(x))).__code__  # as autoreload does
    train_alike(stock, ours)


def test_an_old_instance_of_a_class_whose_file_was_edited_and_loaded_again(load, x, train_alike):
    old = load(PLAIN).Block()
    new = load(PLAIN.replace("F.gelu(self.up(x))", "3 * F.gelu(self.up(x))")).Block()
    for stock in (old, new):
        ours = copy.deepcopy(stock)
        invact.patch(ours, (x,))
        train_alike(stock, ours)


def test_one_function_that_is_the_method_of_two_classes(load, x, train_alike):
    kind = load(PLAIN).Block
    other = type("Other", (kind.__mro__[1],), {"forward": kind.forward})
    for stock in (kind(), other()):
        ours = copy.deepcopy(stock)
        assert len(invact.patch(ours, (x,)).inverted) == 1
        train_alike(stock, ours)


def test_an_error_in_a_rewritten_method_points_at_the_authors_line(load, x):
    kind = load(
        "def forward(self, x):\n"
        "    y = self.down(F.gelu(self.up(x)))\n"
        "    if self.calls: raise ValueError\n"
        "    return y"
    ).Block
    stock, ours = kind(), kind()
    assert invact.patch(ours, (x,)).inverted
    places = []
    for model in (stock, ours):
        model.calls = 1
        with pytest.raises(ValueError) as error:  # noqa: PT011
            model(x)
        last = traceback.extract_tb(error.value.__traceback__)[-1]
        places.append((last.filename, last.lineno, last.line, last.name))
    assert places[0] == places[1]


OPERATIONS = ["F.gelu({0})", "F.silu({0})", "{0} * torch.sigmoid({0})", "F.leaky_relu({0}, self.slope)", "2 * {0}"]
STATEMENTS = ["h = {0}", "h = h + {0}", "h = {0} if self.training else h", "h, z = {0}, h", "h = [{0} for _ in [0]][0]"]


@pytest.mark.parametrize("seed", range(6))
def test_methods_built_at_random_train_as_stock(seed, load, x, train_alike):
    generator = torch.Generator().manual_seed(seed)

    def one_of(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    lines = ["def forward(self, x):", "    h = z = self.up(x)"]
    for _ in range(5):
        value = one_of(["h", "z", "(h + z)", "self.up(self.down(h))"])
        value = value if "(" not in value else one_of(["h", value])
        operation = one_of(OPERATIONS if value in ("h", "z") else [op for op in OPERATIONS if op.count("{0}") == 1])
        lines.append("    " + one_of(STATEMENTS).format(operation.format(value)))
    stock = load("\n".join([*lines, "    return self.down(h + F.gelu(z))"])).Block()
    ours = copy.deepcopy(stock)
    invact.patch(ours, (x,))
    train_alike(stock, ours)


def impl(self, x):
    return self.down(F.gelu(self.up(x)))


class ByAnotherName(nn.Module):
    """Its methods stand where their own names do not say."""

    forward = impl

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


class RenamedAndReplaced(ByAnotherName):
    def feed(self, x):
        return self.down(F.gelu(self.up(x)))

    old_feed = feed

    def feed(self, x):
        return self.old_feed(x) + self.old_feed(2 * x)

    def forward(self, x):
        return self.feed(x)


@pytest.mark.parametrize("kind", [ByAnotherName, RenamedAndReplaced])
def test_a_method_is_found_where_it_stands_and_not_by_its_own_name(kind, train_alike):
    stock = kind()
    ours = copy.deepcopy(stock)
    assert invact.patch(ours, (torch.randn(8, 16),)).inverted
    train_alike(stock, ours)
