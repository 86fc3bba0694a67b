"""What a snapshot notes of one object, by its kind, and how that is put back if it has changed."""

from __future__ import annotations

import collections
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import is_
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from invact.pytorch.tensors import changes_in_place, plain_parts

MISSING: Any = object()
"""Stands for an attribute, a key or a content that was not there."""


class Noted(Protocol):
    """The state of one object, as it was when this was made."""

    def put_back(self) -> None:
        """Makes the object what it was; touches nothing that has not changed."""


def _dead(value: Any) -> bool:
    """Whether this is a weak reference, in a WeakKeyDictionary say, to what is gone meanwhile."""
    return isinstance(value, weakref.ref) and value() is None


def identical(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether two iterables of the same length give the same objects in the same order."""
    return all(map(is_, one, other))


@dataclass(slots=True)
class NotedObject:
    """The class of an object, and which dict holds its attributes; the dict is noted on its own."""

    owner: Any
    kind: type
    dict_of: Any  # the descriptor of __dict__, or None
    attributes: Any

    def put_back(self) -> None:
        if type(self.owner) is not self.kind:
            object.__setattr__(self.owner, "__class__", self.kind)
        if self.dict_of is not None and self.dict_of.__get__(self.owner) is not self.attributes:
            self.dict_of.__set__(self.owner, self.attributes)


@dataclass(slots=True)
class NotedSlots:
    """Values read through descriptors: of __slots__, or of attributes written in C."""

    owner: Any
    members: tuple[Any, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, owner: Any, members: tuple[Any, ...]) -> NotedSlots:
        return cls(owner, members, tuple(_slot(member, owner) for member in members))

    def put_back(self) -> None:
        for member, value in zip(self.members, self.values, strict=True):
            if _slot(member, self.owner) is value:
                continue
            if value is MISSING:
                member.__delete__(self.owner)
            else:
                member.__set__(self.owner, value)


def _slot(member: Any, owner: Any) -> Any:
    try:
        return member.__get__(owner)
    except AttributeError:  # an empty slot
        return MISSING


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


@dataclass(slots=True)
class NotedCell:
    """What a closure's variable holds."""

    owner: Any
    content: Any

    @classmethod
    def of(cls, owner: Any) -> NotedCell:
        return cls(owner, _content(owner))

    def put_back(self) -> None:
        if _content(self.owner) is self.content:
            return
        if self.content is MISSING:
            del self.owner.cell_contents
        else:
            self.owner.cell_contents = self.content


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return MISSING


@dataclass(slots=True)
class NotedNames:
    """What some names of a module, or some attributes of a class, stand for."""

    namespace: Any  # a mapping to read from
    names: tuple[str, ...]
    values: tuple[Any, ...]
    bind: Callable[[str, Any], None]
    unbind: Callable[[str], None]

    @classmethod
    def of_globals(cls, namespace: dict[str, Any], names: Iterable[str]) -> NotedNames:
        chosen = tuple(names)
        values = tuple(namespace.get(name, MISSING) for name in chosen)
        return cls(namespace, chosen, values, namespace.__setitem__, namespace.__delitem__)

    @classmethod
    def of_class(cls, owner: type, names: Iterable[str]) -> NotedNames:
        def bind(name: str, value: Any) -> None:
            type.__setattr__(owner, name, value)

        def unbind(name: str) -> None:
            type.__delattr__(owner, name)

        chosen = tuple(names)
        return cls(owner.__dict__, chosen, tuple(owner.__dict__[name] for name in chosen), bind, unbind)

    def put_back(self) -> None:
        for name, value in zip(self.names, self.values, strict=True):
            now = self.namespace.get(name, MISSING)
            if now is value:
                continue
            if value is MISSING:
                self.unbind(name)
            else:
                self.bind(name, value)


@dataclass(slots=True)
class NotedTensor:
    """A tensor's gradient, hooks and whether it asks for one, and its numbers unless `copies` is False."""

    owner: Tensor
    requires_grad: bool
    grad: Tensor | None
    hooks: Any
    same_storage: Tensor | None  # notices `tensor.data = other`
    copied: Tensor | None
    version: int

    @classmethod
    def of(cls, owner: Tensor, *, copies: bool) -> NotedTensor:
        plain = type(owner) in _PLAIN
        return cls(
            owner,
            owner.requires_grad,
            owner.grad if owner.is_leaf else None,
            owner._backward_hooks,
            owner.detach() if plain else None,
            owner.detach().clone() if copies and not owner.is_meta else None,
            changes_in_place(owner),
        )

    def put_back(self) -> None:
        owner, storage = self.owner, self.same_storage
        if storage is not None and not _same_place(owner, storage):
            owner.data = storage
        if self.copied is not None and not self._same_numbers():
            self._numbers_put_back(self.copied)
        if owner.is_leaf:
            self._leaf_put_back()
        if type(owner) is nn.Parameter and self.copied is None and changes_in_place(owner) != self.version:
            raise RuntimeError(
                f"The model's forward changed in place a parameter of shape {tuple(owner.size())} that it reaches by "
                "another way than its place in the module, so a simulated forward really changed it. Load the weights "
                "again, and let forward reach the parameter as an attribute of its module."
            )

    def _same_numbers(self) -> bool:
        if self.same_storage is None:  # comparing the parts of a DTensor would have to ask other processes
            return changes_in_place(self.owner) == self.version
        now, then = plain_parts(self.owner.detach()), plain_parts(cast(Tensor, self.copied))
        if now is None or then is None:
            return changes_in_place(self.owner) == self.version
        return len(now) == len(then) and all(map(torch.equal, now, then))

    def _numbers_put_back(self, copied: Tensor) -> None:
        data = self.owner.data  # not the owner: no graph that kept it is to think it changed once more
        now, then = plain_parts(data), plain_parts(copied)
        if data.layout is torch.strided or now is None or then is None:
            data.copy_(copied)
        elif [part.size() for part in now] == [part.size() for part in then]:
            for part, was in zip(now, then, strict=True):
                part.copy_(was)
        else:
            self.owner.data = copied

    def _leaf_put_back(self) -> None:
        owner = self.owner
        if owner.requires_grad is not self.requires_grad:
            owner.requires_grad_(self.requires_grad)
        if owner.grad is not self.grad:
            owner.grad = self.grad
        if owner._backward_hooks is not self.hooks:
            owner._backward_hooks = self.hooks


_PLAIN = (Tensor, nn.Parameter, nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)


def _same_place(one: Tensor, other: Tensor) -> bool:
    if any(each.layout is not torch.strided or each.is_nested for each in (one, other)):
        return one.layout is other.layout and one.is_nested is other.is_nested
    return bool(
        one.size() == other.size()  # .shape is refused where a lazy layer has none yet
        and one.dtype is other.dtype
        and one.device == other.device
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
        and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
