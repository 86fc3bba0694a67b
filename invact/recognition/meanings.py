"""What the names in a method stand for, in one module, before the method runs."""

from __future__ import annotations

import ast
import types
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from invact.recognition.dependencies_of_modules import attribute_access_is_its_own, static_attribute
from invact.recognition.pointwise import STEADY_LIBRARIES, home_of, is_function, may_be_pointwise
from invact.recognition.sources import Source, cells_of, source_of

CONSTANTS = (bool, int, float, str, type(None), torch.dtype)
UNKNOWN = object()


@dataclass(frozen=True)
class Method:
    """A method's source, and what its names stand for in one module."""

    function: types.FunctionType
    source: Source
    module: nn.Module
    cells: dict[str, types.CellType]

    def contents(self) -> dict[str, Any]:
        """What the closure of the method holds."""
        return {name: cell.cell_contents for name, cell in self.cells.items() if cell != types.CellType()}

    def meaning(self, node: ast.expr) -> Any:
        """What a constant, a name or a chain of attributes stands for, if that is fixed before the method runs."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id == self.source.self_name:
                return self.module
            if node.id in self.source.variables:
                return UNKNOWN
            contents = self.contents() if self.cells else {}
            return contents.get(node.id, self.function.__globals__.get(node.id, UNKNOWN))
        if isinstance(node, ast.Attribute):
            owner = self.meaning(node.value)
            # Of self only what stands in the instance: properties and methods may do anything.
            if owner is self.module:
                return _of_instance(self.module, node.attr)
            if isinstance(owner, types.ModuleType):
                return getattr(owner, node.attr, UNKNOWN)
        return UNKNOWN

    def may_call(self, function: Any) -> bool:
        """Whether `function` may be a part of an activation here."""
        return may_be_pointwise(function, self.function.__module__)

    def all_meanings(self) -> tuple[Any, ...] | None:
        """Equal for two modules only if the method's expressions compute the same in both.

        None if that can not be told.
        """
        key: list[Any] = []
        for node in self.source.references:
            meaning = self.meaning(node)
            if isinstance(meaning, CONSTANTS):
                key.append((type(meaning), repr(meaning)))
            elif isinstance(meaning, types.ModuleType) or (
                is_function(meaning) and home_of(meaning) in STEADY_LIBRARIES
            ):
                key.append(weakref.ref(meaning))  # equal to another while both are alive and the same
            elif is_function(meaning) and self.may_call(meaning):
                return None  # the author's own may read what changes
            else:
                key.append(None)  # nothing that a curve is built of
        return tuple(key)


def method_of(module: nn.Module, function: types.FunctionType) -> Method | None:
    """A method of the module's class, or None where its source is not proven to be what runs."""
    source = source_of(function)
    return None if source is None else Method(function, source, module, cells_of(function))


def _of_instance(module: nn.Module, name: str) -> Any:
    """What `self.name` gives, where that is what the instance holds and no code of the author's decides."""
    kind = type(module)
    decided = attribute_access_is_its_own(kind) or hasattr(static_attribute(kind, name), "__set__")
    return UNKNOWN if decided or name == "training" else module.__dict__.get(name, UNKNOWN)
