"""All that can be seen from an object, as something to compare: written apart from `invact.snapshot.snapshot`."""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import random
import types
import weakref
from typing import Any

import numpy
import torch


def described(value: Any, seen: dict[int, str] | None = None) -> Any:
    """All that is seen from a value, down to identities of what cannot change: written apart from the snapshot."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, (bool, int, float, str, bytes, type, types.ModuleType)):
        return repr(value)
    if id(value) in seen:
        return seen[id(value)]
    seen[id(value)] = f"object {len(seen)}"
    inside: list[Any] = []
    if isinstance(value, torch.Tensor):
        inside += [id(value), id(value.grad) if value.is_leaf else None, value.requires_grad]
        if isinstance(value, torch.nn.Parameter):
            inside.append(value._version)
        if value.layout is torch.strided and not value.is_nested:
            inside += [value.data_ptr(), value.tolist()]
        else:
            inside += [part.tolist() for part in value.unbind()] if value.is_nested else [value.to_dense().tolist()]
    elif isinstance(value, contextvars.ContextVar):
        inside.append(described(value.get(), seen))
    elif isinstance(value, weakref.ref):
        target = value()  # a method is made anew each time
        inside.append(described(getattr(target, "__self__", target), seen))
    elif isinstance(value, numpy.ndarray):
        inside += [described(each, seen) for each in value.flat] if value.dtype.hasobject else [value.tobytes()]
    elif isinstance(value, (torch.Generator, random.Random)):
        inside.append(str(value.get_state().tolist() if isinstance(value, torch.Generator) else value.getstate()))
    elif isinstance(value, dict):
        inside += [(described(k, seen), described(v, seen)) for k, v in dict.items(value)]
        if isinstance(value, collections.OrderedDict):
            inside.append(list(collections.OrderedDict.keys(value)))
    elif isinstance(value, (set, frozenset)):
        inside += sorted(described(each, seen) for each in value)
    elif isinstance(value, (list, tuple, collections.deque, bytearray, array.array)):
        inside += [described(each, seen) for each in value]
    elif isinstance(value, types.MappingProxyType):
        inside += [(k, described(v, seen)) for k, v in value.items()]
    elif isinstance(value, types.FunctionType):
        inside += [described(cell.cell_contents, seen) for cell in value.__closure__ or ()]
        inside += [described(value.__defaults__, seen), described(value.__kwdefaults__, seen)]
    elif isinstance(value, (types.MethodType, types.BuiltinMethodType)):
        inside.append(described(value.__self__, seen))
    elif isinstance(value, functools.partial):
        inside += [described(value.func, seen), described(value.args, seen), described(value.keywords, seen)]
    for name in getattr(type(value), "__slots__", ()):
        if hasattr(value, name):
            inside.append((name, described(getattr(value, name), seen)))
    if hasattr(value, "__dict__"):
        inside.append(described(vars(value), seen))
    return (type(value).__name__, id(value), *inside)
