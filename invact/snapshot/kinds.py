"""How objects of one class are noted: whether at all, and where their attributes stand."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from invact.snapshot.libraries import is_machinery, of_library

Content = Callable[[Any, Any], None]
"""The method of a snapshot that notes what an object holds beside its attributes."""

_HOLDS_NOTHING: tuple[Any, ...] = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, type(...), type(NotImplemented)),
    *(types.CodeType, types.FrameType, types.TracebackType, types.ModuleType, types.GetSetDescriptorType),
    *(
        types.MemberDescriptorType,
        types.WrapperDescriptorType,
        types.MethodDescriptorType,
        types.ClassMethodDescriptorType,
    ),
    *(*weakref.ProxyTypes, torch.dtype, torch.device, torch.layout, torch.memory_format),
)

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


@dataclass(frozen=True)
class Kind:
    """How objects of one class are noted; nothing of what is left alone is."""

    content: Content
    left_alone: bool = False
    dict_of: Any = None  # the descriptor of __dict__, past any property of that name
    slots: tuple[Any, ...] = ()
    changes_class: bool = False


def kind_of(cls: type, content: Content | None, otherwise: Content) -> Kind:
    """How objects of a class are noted.

    Args:
        content: notes what they hold, where that is known of the class.
        otherwise: notes what they show that they hold, if they are not left alone.
    """
    if issubclass(cls, type):
        return Kind(content or otherwise)
    if issubclass(cls, torch.optim.Optimizer):  # its states are as large as the model, and no forward touches them
        return Kind(otherwise, left_alone=True)
    if content is None and ((issubclass(cls, _HOLDS_NOTHING) and not _has_dict(cls)) or is_machinery(cls)):
        return Kind(otherwise, left_alone=True)
    bases = cls.__mro__
    written_in_python = bool(cls.__flags__ & _HEAP_TYPE)
    return Kind(
        content or otherwise,
        dict_of=next((vars(base)["__dict__"] for base in bases if _has_own_dict(base)), None),
        slots=tuple(
            member
            for base in bases
            if "__slots__" in vars(base)
            for member in vars(base).values()
            if isinstance(member, types.MemberDescriptorType)
        ),
        changes_class=written_in_python and not of_library(cls.__module__),
    )


def _has_dict(cls: type) -> bool:
    return cls.__dictoffset__ != 0 and not issubclass(cls, types.ModuleType)


def _has_own_dict(base: type) -> bool:
    return isinstance(vars(base).get("__dict__"), types.GetSetDescriptorType) and base is not type
