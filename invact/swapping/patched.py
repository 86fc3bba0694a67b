"""What every class that a module is given here has: it pickles and copies as the class that the module had.

The module stays the object it is, with the user's attributes, hooks, parameters and references. Its class alone knows
of us, as `torch.nn.utils.parametrize` does it.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import nn

_THREAD = threading.local()
_CLASS = object.__dict__["__class__"]


class _ClassAsPickled:
    """`__class__` as ever, but for once after `__reduce_ex__`: pickle compares what that says with it."""

    def __get__(self, module: Any, kind: type) -> Any:
        pickled = getattr(_THREAD, "pickled", None)
        if pickled is not None and pickled() is module:
            _THREAD.pickled = None
            return module._invact_stock
        return _CLASS.__get__(module)

    def __set__(self, module: Any, kind: type) -> None:
        _CLASS.__set__(module, kind)


class PatchedSite(NamedTuple):
    """What stands in an activation's place: the method, the curve, and the bits of a derivative that is approximate."""

    method: str
    curve: str
    bits: int | None = None


class Patched:
    """In every class that a module is given here; the first base, before the class that the module had.

    Attributes:
        _invact_stock: the class that the module had before any of ours.
        _invact_below: the class under this one, which may be one of ours.
        _invact_checkpoints: whether one of ours checkpoints its forward.
        _invact_sites: what is inverted or approximated in it; the method of an activation is "".
    """

    _invact_stock: ClassVar[type[nn.Module]]
    _invact_below: ClassVar[type[nn.Module]]
    _invact_checkpoints: ClassVar[bool] = False
    _invact_sites: ClassVar[tuple[PatchedSite, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The user's own `__init_subclass__`, which may keep a register, is not told of our classes."""

    __class__ = _ClassAsPickled()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the stock module would be: a pickle can be read where there is no invact."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, arguments, *rest = reduced
        kind, stock = type(self), self._invact_stock
        make, *arguments = (stock if part is kind else part for part in (make, *arguments))
        if getattr(make, "__name__", "").startswith("__newobj"):
            _THREAD.pickled = weakref.ref(self)
        return (make, tuple(arguments), *rest)

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for this first; further on it would mix our method up with its stock source."""
        raise NotImplementedError(
            f"torch.jit.script can not compile a {self._invact_stock.__name__} that invact has patched, since "
            "TorchScript has no autograd functions and no hooks on what autograd keeps. Call invact.unpatch(model) "
            "first."
        )

    def __copy__(self) -> Any:
        return self._twin(super(), "__copy__", lambda part: part, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._twin(super(), "__deepcopy__", lambda part: copy.deepcopy(part, memo), memo, memo)

    def _twin(self, stock: Any, own: str, copied: Callable[[Any], Any], memo: dict[int, Any], *args: Any) -> Any:
        """A copy as the stock class makes it, patched as this is."""
        if hasattr(stock, own):
            twin = getattr(stock, own)(*args)
        else:
            reduced = stock.__reduce_ex__(4)
            if isinstance(reduced, str):
                return self
            make, arguments, *rest = reduced
            twin = memo[id(self)] = make(*copied(arguments))
            if rest and rest[0] is not None:
                _set_state(twin, copied(rest[0]))
        if type(twin) is self._invact_stock:
            set_class(twin, type(self))
        return twin


def _set_state(twin: Any, state: Any) -> None:
    """As `copy` does it."""
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    twin.__dict__.update(attributes or {})
    for name, value in (slots or {}).items():
        setattr(twin, name, value)


def set_class(module: nn.Module, kind: type) -> None:
    """Gives a module another class; nothing else of it changes."""
    _CLASS.__set__(module, kind)  # past a `__setattr__` of the user's


def is_patched(module: Any) -> bool:
    """Asked of what calls a method of ours: it may have its own class again."""
    return isinstance(module, Patched)


def stock_class(module: nn.Module) -> type:
    """The class that a module had before any of ours."""
    kind = type(module)
    return kind._invact_stock if issubclass(kind, Patched) else kind


def inverted_in(module: nn.Module) -> tuple[str, tuple[PatchedSite, ...]]:
    """The name of the class that a module had, and what is inverted or approximated in it; nothing if it is stock.

    Example:
        >>> inverted_in(nn.GELU())
        ('', ())
    """
    kind = type(module)
    return (kind._invact_stock.__name__, kind._invact_sites) if issubclass(kind, Patched) else ("", ())
