"""Names and what they stood for: attributes and slots of objects, closures' variables, names of modules and classes."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from invact.snapshot.noted import MISSING


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
class NotedNewNames:
    """Which attributes a class has: data that it got since is taken from it; a method that it got, another patched."""

    owner: type
    names: frozenset[str]

    def put_back(self) -> None:
        for name in [n for n, each in vars(self.owner).items() if not (is_dunder(n) or is_code(each))]:
            if name not in self.names:
                type.__delattr__(self.owner, name)


def is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, type, staticmethod, classmethod, property)) or hasattr(
        type(value), "__get__"
    )
