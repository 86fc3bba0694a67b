"""Containers as they were noted: dicts, lists, sets, deques, buffers and numpy arrays."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any

from invact.snapshot.noted import MISSING


def _dead(value: Any) -> bool:
    """Whether this is a weak reference, in a WeakKeyDictionary say, to what is gone meanwhile."""
    return isinstance(value, weakref.ref) and value() is None


def identical(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two iterables of the same length give the same objects in the same order."""
    return all(map(is_, one, other))


@dataclass(slots=True)
class NotedDict:
    """Keys and values in their order, read and written past whatever a subclass makes of access."""

    owner: Any
    base: Any  # dict, or OrderedDict, which keeps an order of its own
    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, owner: Any) -> NotedDict:
        base = _base_of(owner)
        return cls(owner, base, tuple(base.keys(owner)), tuple(base.values(owner)))

    def put_back(self) -> None:
        now = tuple(self.base.keys(self.owner))
        same_keys = len(now) == len(self.keys) and identical(now, self.keys)
        if same_keys and identical(self.base.values(self.owner), self.values):
            return
        if not same_keys:
            kept = {id(key) for key in self.keys}
            for key in now:
                if id(key) not in kept:
                    self.base.__delitem__(self.owner, key)
            left = [key for key in now if id(key) in kept]
            # What is added stands at the end: where that is not its place, all have to be put in anew.
            if not identical(left, self.keys):
                self.base.clear(self.owner)
        for key, value in zip(self.keys, self.values, strict=True):
            if not (_dead(key) or _dead(value)) and dict.get(self.owner, key, MISSING) is not value:
                self.base.__setitem__(self.owner, key, value)


def _base_of(owner: Any) -> Any:
    return collections.OrderedDict if isinstance(owner, collections.OrderedDict) else dict


@dataclass(slots=True)
class NotedEmptyDict:
    """A dict, or an OrderedDict, that held nothing."""

    owner: Any

    def put_back(self) -> None:
        if dict.__len__(self.owner):
            NotedDict(self.owner, _base_of(self.owner), (), ()).put_back()


@dataclass(slots=True)
class NotedList:
    owner: list[Any]
    items: list[Any]

    @classmethod
    def of(cls, owner: list[Any]) -> NotedList:
        return cls(owner, list.copy(owner))

    def put_back(self) -> None:
        if list.__len__(self.owner) != len(self.items) or not identical(list.__iter__(self.owner), self.items):
            list.__setitem__(self.owner, slice(None), self.items)


@dataclass(slots=True)
class NotedSet:
    owner: set[Any]
    items: set[Any]

    @classmethod
    def of(cls, owner: set[Any]) -> NotedSet:
        return cls(owner, set(set.__iter__(owner)))

    def put_back(self) -> None:
        if set(map(id, set.__iter__(self.owner))) != set(map(id, self.items)):
            set.clear(self.owner)
            set.update(self.owner, (item for item in self.items if not _dead(item)))


@dataclass(slots=True)
class NotedDeque:
    owner: collections.deque[Any]
    items: list[Any]

    @classmethod
    def of(cls, owner: collections.deque[Any]) -> NotedDeque:
        return cls(owner, list(collections.deque.__iter__(owner)))

    def put_back(self) -> None:
        now = list(collections.deque.__iter__(self.owner))
        if len(now) != len(self.items) or not identical(now, self.items):
            collections.deque.clear(self.owner)
            collections.deque.extend(self.owner, self.items)


@dataclass(slots=True)
class NotedBuffer:
    """The bytes of a bytearray, or the numbers of an array.array."""

    owner: Any
    items: Any

    @classmethod
    def of(cls, owner: Any) -> NotedBuffer:
        return cls(owner, owner[:])

    def put_back(self) -> None:
        if self.owner != self.items:
            self.owner[:] = self.items


@dataclass(slots=True)
class NotedArray:
    """The elements of a numpy array."""

    owner: Any
    copied: Any

    @classmethod
    def of(cls, owner: Any) -> NotedArray:
        return cls(owner, owner.copy(order="K"))

    def put_back(self) -> None:
        if self.owner.shape != self.copied.shape:
            self.owner.resize(self.copied.shape, refcheck=False)
        if self.owner.dtype.hasobject:
            same = identical(self.owner.flat, self.copied.flat)
        else:  # as bytes, since NaN is not equal to itself
            same = self.owner.tobytes() == self.copied.tobytes()
        if not same:
            self.owner[...] = self.copied
