"""Simulated tensors that outlive a probe: found, taken out of caches, or told with who holds them."""

from __future__ import annotations

import collections
import functools
import gc
import sys
import threading
import types
from dataclasses import dataclass
from typing import Any

from torch import nn

from invact.pytorch.fake_tensors import FakeTensor, FakeTensorMode

_LEVELS = 6
"""How many objects are climbed from a tensor to who holds it: list, attributes, object and so on."""
_NAMED = 3
"""How many holders an error tells of."""
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_PARTS_OF_CONTAINERS = ("weakref", "_weakrefset", "collections", "_thread")
_Cached = type(functools.lru_cache(lambda: None))


class LeftoverError(RuntimeError):
    """Something of the user's still holds simulated tensors, which no real training can go on with."""


def references_to(mode: FakeTensorMode) -> int:
    """How many hold `mode`. Each of its tensors does: while there are no more than at first, none is alive.

    Asked so that the search through all objects, a tenth of a second where libraries are loaded, is the exception.
    """
    return sys.getrefcount(mode)


def check_no_leftovers(mode: FakeTensorMode) -> None:
    """Makes sure that no simulated tensor of `mode` is alive; call it when nothing of ours holds one.

    What sits in a functools.lru_cache is taken out by clearing that cache, which fills again. Call it where no
    error is under way: a traceback holds the local variables of the code that failed.

    Raises:
        LeftoverError: names who holds them and what to do.
    """
    if not _alive(mode):
        return
    gc.collect()  # what only a dead cycle holds is no leftover
    if _empty_caches(_alive(mode)):
        gc.collect()
    found = _alive(mode)
    if found:
        count, names = len(found), _holders(found)
        found.clear()  # else the error's traceback would be one more who holds them
        raise LeftoverError(
            f"invact ran the model's forward on simulated tensors, which hold no numbers, and {count} of them "
            f"{'is' if count == 1 else 'are'} still held by {' and by '.join(names)}. Nothing was patched. Empty that, "
            "or take out the code that puts them there (a hook, say) until the model is patched."
        )


def _alive(mode: FakeTensorMode) -> list[FakeTensor]:
    return [each for each in gc.get_objects() if type(each) is FakeTensor and each.fake_mode is mode]


@dataclass(slots=True, eq=False)
class _Step:
    """One object on a way from a tensor to who holds it. The search holds objects in these alone, to know its own."""

    holder: Any
    below: _Step | None  # what the holder holds


def _climbed(found: list[FakeTensor]) -> list[_Step]:
    """The objects that lead to the tensors, nearest first, up to those that have a name for the user."""
    level = [_Step(tensor, None) for tensor in found]
    seen = {id(step.holder) for step in level}
    climbed: list[_Step] = []
    for _ in range(_LEVELS):
        level = [step for step in _above(level, id(found)) if id(step.holder) not in seen]
        seen.update(id(step.holder) for step in level)
        climbed += level
        level = [step for step in level if not isinstance(step.holder, _Cached) and _place(step) is None]
        if not level:
            break
    return climbed


def _above(level: list[_Step], ours: int) -> list[_Step]:
    """Who holds the objects of one level, without frames that run now and without this search itself."""
    by_id = {id(step.holder): step for step in level}
    objects = [step.holder for step in level]
    passed_by = {ours, id(objects)}
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        passed_by.add(id(frame))
        frame = frame.f_back
    steps = []
    for holder in gc.get_referrers(*objects):
        if not _is_ours(holder) and id(holder) not in passed_by:
            held = next((by_id[id(each)] for each in gc.get_referents(holder) if id(each) in by_id), None)
            if held is not None:
                steps.append(_Step(holder, held))
    return steps


def _is_ours(holder: Any) -> bool:
    """Whether this search holds it, or the probe: what an operation kept lives as long as the user's own result."""
    module = type(holder).__module__
    return module == __name__ or module.startswith(("invact.deriving.", "invact.ledger.", "invact.probing."))


def _empty_caches(found: list[FakeTensor]) -> int:
    """Clears each functools.lru_cache that holds one of the tensors, itself or in containers; how many did."""
    caches = [step.holder for step in _climbed(found) if isinstance(step.holder, _Cached)]
    for cache in caches:
        cache.cache_clear()
    return len(caches)


def _holders(found: list[FakeTensor]) -> list[str]:
    """In words, who holds the tensors; the first few of them."""
    steps = _climbed(found)
    named = [f"{_inner(step)}{place}" for step in steps if (place := _place(step)) is not None]
    if named:
        return list(dict.fromkeys(named))[:_NAMED]
    if local := _local_of_another_thread({id(step.holder) for step in steps}):
        return [local]
    if steps:
        return [f"{_a(type(steps[-1].holder).__qualname__)} that has no name"]
    return ["code that is not Python's, such as a graph of autograd that something keeps"]


def _local_of_another_thread(holders: set[int]) -> str | None:
    """Running code does not show what it holds to the search; its frames do, if they are asked."""
    for thread, top in sys._current_frames().items():
        frame = top if thread != threading.get_ident() else None
        while frame is not None:
            for name, value in frame.f_locals.items():
                if id(value) in holders:
                    return f"local variable `{name}` of {_code(frame.f_code)}, which another thread runs"
            frame = frame.f_back
    return None


def _inner(step: _Step) -> str:
    """The containers between the tensor and what has a name: "a list in "."""
    below, words = step.below, ""
    while below is not None:
        kind = type(below.holder)
        if isinstance(below.holder, _CONTAINERS) or kind.__module__ in _PARTS_OF_CONTAINERS:
            words = f"{_a(kind.__name__)} in {words}"
        below = below.below
    return words


def _place(step: _Step) -> str | None:
    """What the holder calls what it holds, if it has a name for that which the user knows, else None."""
    holder, held = step.holder, step.below.holder if step.below is not None else None
    if isinstance(holder, _Cached):
        return f"the cache of {_function(holder.__wrapped__)}"
    if isinstance(holder, dict):
        return _place_in_dict(holder, held)
    if isinstance(holder, types.CellType):
        return _place_in_cell(holder)
    if isinstance(holder, types.FunctionType):
        return f"defaults or attributes of {_function(holder)}"
    if isinstance(holder, types.FrameType):
        return f"local variables of {_code(holder.f_code)}, which an error's traceback keeps"
    if isinstance(holder, (types.GeneratorType, types.CoroutineType)):
        return f"local variables of {_code(holder.gi_code if hasattr(holder, 'gi_code') else holder.cr_code)}"
    if isinstance(holder, type):
        return f"an attribute of {_class(holder)}"
    if type(holder).__module__ in _PARTS_OF_CONTAINERS:
        return None
    attributes = getattr(holder, "__dict__", None)
    names = attributes if isinstance(attributes, dict) else {}
    slots = {name: getattr(holder, name, None) for cls in type(holder).__mro__ for name in _slots_of(cls)}
    for name, value in [*names.items(), *slots.items()]:
        if value is held:
            return f"attribute `{name}` of {_object(holder)}"
    return None


def _place_in_dict(holder: dict[Any, Any], held: Any) -> str | None:
    name = next((name for name, value in dict.items(holder) if value is held), None)
    module = sys.modules.get(str(holder.get("__name__")))
    if module is not None and vars(module) is holder:
        return f"the global `{name}` of module `{module.__name__}`"
    for owner in gc.get_referrers(holder):
        if isinstance(owner, type) and owner.__dict__.get(str(name)) is held:
            return f"attribute `{name}` of {_class(owner)}"
        if type(owner).__module__ in _PARTS_OF_CONTAINERS:
            return None
        if getattr(owner, "__dict__", None) is holder and not isinstance(owner, types.FunctionType):
            return f"attribute `{name}` of {_object(owner)}"
    return None


def _place_in_cell(cell: types.CellType) -> str:
    for function in gc.get_referrers(cell):
        if isinstance(function, tuple):  # that of a function's cells
            for owner in gc.get_referrers(function):
                if isinstance(owner, types.FunctionType) and owner.__closure__ is function:
                    name = owner.__code__.co_freevars[[id(each) for each in function].index(id(cell))]
                    return f"closure variable `{name}` of {_function(owner)}"
    return "a variable of a function inside another"


def _slots_of(cls: type) -> list[str]:
    return [name for name, each in vars(cls).items() if isinstance(each, types.MemberDescriptorType)]


def _object(value: Any) -> str:
    if isinstance(value, types.ModuleType):
        return f"module `{value.__name__}`"
    kind = "the module" if isinstance(value, nn.Module) else "an object"
    return f"{kind} of {_class(type(value))}"


def _class(cls: type) -> str:
    return f"class `{cls.__module__}.{cls.__qualname__}`"


def _function(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return _code(code) if code is not None else f"function `{getattr(function, '__qualname__', function)}`"


def _code(code: types.CodeType) -> str:
    return f"function `{getattr(code, 'co_qualname', code.co_name)}` ({code.co_filename}:{code.co_firstlineno})"


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"
