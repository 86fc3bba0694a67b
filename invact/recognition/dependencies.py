"""What an activation computes with besides its input, and whether that is still what it was.

A slope may be annealed, a constant in a closure or a file may change. What was recognised as a curve is that curve only
as long as everything that its code reads is the same.
"""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
GONE = object()
"""Stands for what is not there: an attribute that nothing has, a cell in which nothing was put yet."""


class UnseenError(Exception):
    """The code reads something that could change without being noticed."""


class Reading:
    """One value that code reads, and where: `owner` is None for the module itself."""

    __slots__ = ("name", "owner", "value")

    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reading):
            return NotImplemented
        return (self.owner is other.owner and self.name == other.name) and _same(self.value, other.value)

    def __hash__(self) -> int:
        return hash((id(self.owner), self.name))

    def now(self, module: nn.Module) -> Any:
        """What stands there at present."""
        if self.owner is None:
            return without_self(module.__dict__.get(self.name, GONE), module)
        if isinstance(self.owner, types.CellType):
            return contents_of(self.owner)
        if isinstance(self.owner, dict):
            return self.owner.get(self.name, GONE)
        return getattr(self.owner, self.name, GONE)


class Dependencies:
    """Everything that some code reads besides its arguments. Equal ones mean the same computation.

    Example:
        >>> from invact.recognition.dependencies_of_modules import dependencies_of_module
        >>> act = nn.LeakyReLU(0.3)
        >>> dependencies = dependencies_of_module(act)
        >>> dependencies.unchanged(act)
        True
        >>> act.negative_slope = 0.01
        >>> dependencies.unchanged(act)
        False
    """

    __slots__ = ("_absent", "_attributes", "_can_be_traced", "readings")

    def __init__(self, readings: Iterator[Reading]) -> None:
        self.readings = tuple(dict.fromkeys(readings))
        own = [reading for reading in self.readings if reading.owner is None]
        self._attributes = tuple((reading.name, reading.value) for reading in own if reading.value is not GONE)
        self._absent = tuple(reading.name for reading in own if reading.value is GONE)
        # torch.compile watches attributes by itself; of what stands elsewhere only code is taken not to change
        self._can_be_traced = all(_is_code(reading) for reading in self.readings if reading.owner is not None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dependencies) and self.readings == other.readings

    def __hash__(self) -> int:
        return hash(self.readings)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether all of it is what it was, for a module of the same class as the one that was read."""
        if torch.compiler.is_compiling():
            as_set = all(getattr(module, name) == value for name, value in self._attributes)
            # that it was asked for makes torch.compile watch whether it stands on the instance later
            absent = all(hasattr(module, name) and name not in module.__dict__ for name in self._absent)
            return self._can_be_traced and as_set and absent
        for reading in self.readings:
            now = reading.now(module)
            if now is not reading.value and not _same(now, reading.value):
                return False
        return True


def _is_code(reading: Reading) -> bool:
    no_defaults = isinstance(reading.owner, types.FunctionType) and not reading.value
    return callable(reading.value) or isinstance(reading.value, types.CodeType) or no_defaults


def is_atom(value: Any) -> bool:
    """Whether a value can not change in itself."""
    return isinstance(value, _ATOMS) or (isinstance(value, (tuple, frozenset)) and all(map(is_atom, value)))


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (is_atom(one) or callable(one)) and bool(one == other))


def contents_of(cell: types.CellType) -> Any:
    """What a cell of a closure holds, or `GONE`."""
    try:
        return cell.cell_contents
    except ValueError:  # nothing was put there yet, or it was deleted
        return GONE


def without_self(value: Any, module: nn.Module) -> Any:
    """A method of a module that is an attribute of it as well, by its function: what is read holds no module."""
    return value.__func__ if isinstance(value, types.MethodType) and value.__self__ is module else value
