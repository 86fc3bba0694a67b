"""Everything that Python can reach from a model, noted before a forward pass and put back after it."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import gc
import itertools
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from invact.pytorch.modes import modes_off
from invact.snapshot.kinds import Content, Kind, kind_of
from invact.snapshot.libraries import is_core, of_library
from invact.snapshot.named_globals import named_globals
from invact.snapshot.noted import Noted
from invact.snapshot.noted_containers import (
    NotedArray,
    NotedBuffer,
    NotedDeque,
    NotedDict,
    NotedEmptyDict,
    NotedList,
    NotedSet,
)
from invact.snapshot.noted_names import (
    NotedCell,
    NotedNames,
    NotedNewNames,
    NotedObject,
    NotedSlots,
    is_code,
    is_dunder,
)
from invact.snapshot.noted_tensors import NotedTensor
from invact.snapshot.random_states import generator_of, global_generators

_BIG = 100_000
"""A container of more items than this is noted, but its items are not looked into; chosen, not measured."""


@contextmanager
def as_it_was(*roots: Any, tensors: bool = False) -> Iterator[None]:
    """Puts back at the end of the block, however it ends, all that can be reached from `roots`; see `Snapshot`.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> model.seen = [1]
        >>> with as_it_was(model):
        ...     model.seen.append(2)
        ...     model.extra = torch.rand(1)
        >>> model.seen, hasattr(model, "extra")
        ([1], False)
    """
    snapshot = Snapshot(*roots, tensors=tensors)
    try:
        yield
    finally:
        snapshot.put_back()


class Snapshot:
    """The state of all that Python can reach from some objects, and of the generators of random numbers.

    Noted are attributes, classes of objects, containers, numpy arrays, closures and defaults of functions, data of
    classes, and the globals that code which is no library's names. `put_back` writes only where something differs.

    Known limits: how far an iterator has come, objects written in C that do not show what they hold, what another
    thread keeps for itself, locks, files, and what the standard library and torch keep of their own are left alone.

    Args:
        roots: where to begin: a model, its inputs.
        tensors: notes the numbers in parameters as well, which takes a copy of each; of other tensors always.
    """

    def __init__(self, *roots: Any, tensors: bool = False) -> None:
        self._tensors = tensors
        self._noted: list[Noted] = []
        self._seen: dict[int, Any] = {}  # holds what it names, so that no identity is given away meanwhile
        self._kinds: dict[type, Kind] = {}
        self._waiting: list[Any] = list(roots)
        with modes_off():
            self._noted += global_generators()
            while self._waiting:
                value = self._waiting.pop()
                if id(value) not in self._seen:
                    self._seen[id(value)] = value
                    self._note(value)

    def put_back(self) -> None:
        """Makes everything what it was; an object that cannot be put back does not keep the others from it."""
        errors: list[Exception] = []
        with modes_off():
            for noted in self._noted:
                try:
                    noted.put_back()
                except Exception as error:
                    errors.append(error)
        if errors:
            try:
                raise errors[0]
            finally:
                del errors  # else the traceback would keep all that was noted alive

    def _note(self, value: Any) -> None:
        cls = type(value)
        kind = self._kinds.get(cls)
        if kind is None:
            kind = self._kinds[cls] = kind_of(cls, _content_of(cls), Snapshot._referents)
            if not kind.left_alone:
                self._waiting.append(cls)
        if kind.left_alone:
            return
        if kind.dict_of is not None:
            attributes = kind.dict_of.__get__(value)
            self._noted.append(NotedObject(value, cls, kind.dict_of, attributes))
            self._waiting.append(attributes)
        elif kind.changes_class:
            self._noted.append(NotedObject(value, cls, None, None))
        if kind.slots:
            slots = NotedSlots.of(value, kind.slots)
            self._noted.append(slots)
            self._follow(slots.values)
        kind.content(self, value)

    def _follow(self, values: Any) -> None:
        kinds = self._kinds
        for value in values:
            kind = kinds.get(type(value))
            if kind is None or not kind.left_alone:
                self._waiting.append(value)

    # One method for each kind of content.

    def _nothing(self, value: Any) -> None:
        pass

    def _referents(self, value: Any) -> None:
        self._follow(gc.get_referents(value))

    def _dict(self, value: dict[Any, Any]) -> None:
        if not dict.__len__(value):  # most are: the hooks of modules that have none
            self._noted.append(NotedEmptyDict(value))
            return
        if _is_of_a_module_or_class(value):
            return
        noted = NotedDict.of(value)
        self._noted.append(noted)
        if len(noted.keys) <= _BIG:
            self._follow(noted.values)
            self._follow(noted.keys)

    def _list(self, value: list[Any]) -> None:
        noted = NotedList.of(value)
        self._noted.append(noted)
        if len(noted.items) <= _BIG:
            self._follow(noted.items)

    def _tuple(self, value: tuple[Any, ...]) -> None:
        if tuple.__len__(value) <= _BIG:
            self._follow(tuple.__iter__(value))

    def _set(self, value: set[Any]) -> None:
        noted = NotedSet.of(value)
        self._noted.append(noted)
        self._follow(noted.items)

    def _deque(self, value: collections.deque[Any]) -> None:
        noted = NotedDeque.of(value)
        self._noted.append(noted)
        self._follow(noted.items)

    def _buffer(self, value: Any) -> None:
        self._noted.append(NotedBuffer.of(value))

    def _array(self, value: Any) -> None:
        if value.flags.writeable:
            self._noted.append(NotedArray.of(value))
        if value.dtype.hasobject:
            self._follow(value.flat)

    def _cell(self, value: Any) -> None:
        noted = NotedCell.of(value)
        self._noted.append(noted)
        self._follow((noted.content,))

    def _cycle(self, value: itertools.cycle[Any]) -> None:
        for held in gc.get_referents(value):  # an iterator, and a list of its own that must grow as it does
            self._follow(held if type(held) is list else (held,))

    def _weak(self, value: weakref.ref[Any]) -> None:
        self._follow((value(),))

    def _context_variable(self, value: contextvars.ContextVar[Any]) -> None:
        self._follow((value.get(None), *gc.get_referents(value)))  # the latter for its default

    def _of_this_thread(self, value: threading.local) -> None:
        self._waiting.append(value.__dict__)

    def _generator(self, value: Any) -> None:
        noted = generator_of(value)
        if noted is not None:
            self._noted.append(noted)

    def _tensor(self, value: Tensor) -> None:
        # Operations that see no simulated tensor run for real inside a simulated pass: those of a counter, say.
        noted = NotedTensor.of(value, copies=self._tensors or not isinstance(value, nn.Parameter))
        self._noted.append(noted)
        self._follow((noted.hooks,))
        if noted.grad is not None and id(noted.grad) not in self._seen:  # no forward writes its numbers
            self._seen[id(noted.grad)] = noted.grad
            self._noted.append(NotedTensor.of(noted.grad, copies=self._tensors))

    def _built_in(self, value: Any) -> None:
        self._follow((value.__self__,))  # such as the list of `seen.append`

    def _function(self, value: types.FunctionType) -> None:
        noted = NotedSlots.of(value, _OF_FUNCTIONS)
        self._noted.append(noted)
        self._follow((*noted.values, *(value.__closure__ or ())))
        if not of_library(value.__globals__.get("__name__")):
            bindings, values = named_globals(value)
            self._noted += bindings
            self._follow(values)

    def _class(self, value: type) -> None:
        self._waiting += value.__mro__[1:]
        if is_core(value.__module__):
            return
        attributes = {name: each for name, each in vars(value).items() if not is_dunder(name)}
        data = {name: each for name, each in attributes.items() if not is_code(each)}
        self._noted.append(NotedNames.of_class(value, data))
        self._noted.append(NotedNewNames(value, frozenset(attributes)))
        if of_library(value.__module__):
            self._follow(data.values())
        else:  # its methods, those like __call__ as well, name globals
            self._follow(each for name, each in vars(value).items() if name not in ("__dict__", "__weakref__"))


_OF_FUNCTIONS = (vars(types.FunctionType)["__defaults__"], vars(types.FunctionType)["__kwdefaults__"])
_CONTENTS: dict[type, Content] = {
    dict: Snapshot._dict,
    list: Snapshot._list,
    tuple: Snapshot._tuple,
    set: Snapshot._set,
    collections.deque: Snapshot._deque,
    bytearray: Snapshot._buffer,
    threading.local: Snapshot._of_this_thread,
    contextvars.ContextVar: Snapshot._context_variable,
    itertools.cycle: Snapshot._cycle,
    weakref.ref: Snapshot._weak,
    array.array: Snapshot._buffer,
    types.CellType: Snapshot._cell,
    types.FunctionType: Snapshot._function,
    types.BuiltinFunctionType: Snapshot._built_in,
    type: Snapshot._class,
    Tensor: Snapshot._tensor,
    torch.Generator: Snapshot._generator,
    # It shows its cache, whose inside must not be touched; what it wraps is among its attributes.
    type(functools.lru_cache(lambda: None)): Snapshot._nothing,
}


def _content_of(cls: type) -> Content | None:
    """The method that notes what objects of a class hold, if that is known of it."""
    if issubclass(cls, type):
        return Snapshot._class
    bases = cls.__mro__
    content = next((_CONTENTS[base] for base in bases if base in _CONTENTS), None)
    if content is None and _draws_random_numbers(bases):
        content = Snapshot._generator
    if content is None and any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in bases):
        on_disk = any(base.__name__ == "memmap" for base in bases)
        content = Snapshot._nothing if on_disk else Snapshot._array
    return content


def _draws_random_numbers(bases: tuple[type, ...]) -> bool:
    names = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in bases if base.__module__}
    numpys = {"numpy.Generator", "numpy.BitGenerator", "numpy.RandomState"}
    return not names.isdisjoint({"random.Random", *numpys})


def _is_of_a_module_or_class(value: dict[Any, Any]) -> bool:
    name = dict.get(value, "__name__")
    if isinstance(name, str) and getattr(sys.modules.get(name), "__dict__", None) is value:
        return True
    return dict.__contains__(value, "__module__") and dict.__contains__(value, "__doc__")
