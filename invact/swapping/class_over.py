"""A class of ours over the one that a module has: how it is made, shared by modules that are alike, and taken off."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from invact.swapping.patched import Patched, PatchedSite
from invact.swapping.transformers_layer import let_it_be_checkpointed

# By the class under it and what is done there, so that the equal layers of a model share one class and torch.compile
# sees one. Nothing is kept alive here: a class that no module has any more is collected, and so is the one under it,
# with what those of a probe saw.
_CLASSES: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Hashable, type]] = weakref.WeakKeyDictionary()


def shared_class(below: type, done: Hashable, make: Callable[[], type]) -> type:
    """The class over `below` in which this is done, made if no module has it."""
    over = _CLASSES.setdefault(below, weakref.WeakValueDictionary())
    kind = over.get(done)
    if kind is None:
        kind = over[done] = make()
    return kind


def class_over(below: type, first: type[Patched], methods: Mapping[str, Any], sites: tuple[PatchedSite, ...]) -> type:
    """A subclass that looks like the class it is of, made past metaclasses that keep a register."""
    copied = {name: getattr(below, name) for name in ("__module__", "__qualname__", "__doc__")}
    stock = below._invact_stock if issubclass(below, Patched) else below
    names = {**copied, **methods, "_invact_stock": stock, "_invact_below": below, "_invact_sites": sites}
    metaclass = type(below)
    make = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    bases = (below,) if issubclass(below, first) else (first, below)
    kind = make(metaclass, below.__name__, bases, names)
    if "forward" in methods:
        let_it_be_checkpointed(kind)
    return kind


def sites_below(below: type) -> tuple[PatchedSite, ...]:
    """What is inverted or approximated in a class already, which stays so in one over it."""
    return below._invact_sites if issubclass(below, Patched) else ()


def class_without(kind: type, ours: type[Patched]) -> type:
    """The class under ours, or that of somebody, such as FSDP, who has put his own on top, over it."""
    if kind is ours:
        below: type = ours._invact_below
        return below
    bases = tuple(class_without(base, ours) if issubclass(base, ours) else base for base in kind.__bases__)
    names = {name: value for name, value in kind.__dict__.items() if name not in ("__dict__", "__weakref__")}
    if "_invact_below" in names:
        names["_invact_below"] = bases[-1]
    return type.__new__(type(kind), kind.__name__, bases, names)
