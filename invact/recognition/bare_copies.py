"""A copy of a module to be tried out, without its hooks; the module itself is never run."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from invact.recognition.dependencies_of_modules import EVERY_MODULE_HAS


class RaisedError(Exception):
    """The module's own code raised: whatever it raises on a plain tensor, it is nothing that is known here."""


def output_of(module: nn.Module, x: Tensor, *, training: bool = True) -> Any:
    """What the module gives for a tensor that it may change."""
    try:
        return module.train(training).forward(x)
    except Exception as error:
        raise RaisedError from error


def bare_copy(module: nn.Module) -> nn.Module:
    """A module of the same class and contents; containers are its own, what they hold is not."""
    bare = type(module).__new__(type(module))
    contents = {k: copy.copy(v) if isinstance(v, _CONTAINERS) else v for k, v in module.__dict__.items()}
    bare.__dict__.update(contents)
    bare.__dict__.update({name: none for name, none in nn.Module().__dict__.items() if "hook" in name})
    return bare


_CONTAINERS = (list, dict, set, Tensor)


def state_of(module: nn.Module) -> str | None:
    """All that the module holds, as text; None where something in it does not say what it is."""
    try:
        # repr sees counters, flags and small tensors alike; the training flag is ours to set.
        return repr({k: v for k, v in module.__dict__.items() if k not in EVERY_MODULE_HAS})
    except Exception:
        return None
