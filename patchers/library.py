"""What invact needs to know of a library: how a model is built by its name, and what it reads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from .request_errors import MissingLibraryError

ExampleInputs = dict[str, Any] | tuple[Any, ...]
"""A dict is passed to the model as keyword arguments, a tuple as positional ones."""


class Load(Protocol):
    """Builds the model of that name for training, on the meta device, without weights."""

    def __call__(self, name: str, dtype: torch.dtype, image_size: int | None = None) -> nn.Module: ...


class MakeInputs(Protocol):
    """Makes the smallest sensible inputs with which the model's forward gives a training graph, and its loss if any."""

    def __call__(
        self,
        model: Any,
        batch_size: int,
        seq_len: int | None = None,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
        loss: bool = True,
    ) -> ExampleInputs: ...


@dataclass(frozen=True)
class Library:
    """What `invact` needs to know of one library.

    Limits: nothing of it is tried when it is registered; what is wrong shows where a model is first loaded or given
    inputs. `load` must draw on no network for a name in `names`, and allocate no weights; `example_inputs` must draw no
    random number. A model is the library's if its class, or one that it derives from, was defined in `package`, and if
    it has all `marks`: choose marks that layers of the library, which are no models, do not have.

    Attributes:
        name: as in `--library`, in a `name/model` prefix and in `pip install 'invact[name]'`.
        package: the top-level package that it is imported by.
        marks: the attributes that tell a whole model of this library from one of its layers.
        load: see `Load`.
        example_inputs: see `MakeInputs`.
        names: the model names known without a network.
        reads: whether a directory holds a configuration of this library.
        as_on_real_tensors: a block in which the library treats fake tensors that stand for these inputs as it
            treats real ones.
        checkpoint: switches gradient checkpointing on, without reentrance, by the method that the library's models
            have for it; gives whether this model has one. Asked of models of any library.
    """

    name: str
    package: str
    marks: tuple[str, ...]
    load: Load
    example_inputs: MakeInputs
    names: Callable[[], list[str]]
    reads: Callable[[Path], bool]
    as_on_real_tensors: Callable[[Any], AbstractContextManager[None]] = nullcontext
    checkpoint: Callable[[Any], bool] = lambda model: False

    def owns(self, model: nn.Module) -> bool:
        """Whether the model's class, or one that it derives from, is one of this library's models."""
        roots = {base.__module__.partition(".")[0] for base in type(model).__mro__}
        return self.package in roots and all(hasattr(model, mark) for mark in self.marks)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def require(self) -> None:
        """Raise `MissingLibraryError`, which names the pip command, where the library is not installed."""
        if not self.installed:
            raise MissingLibraryError(
                f"{self.name} is not installed, and this model comes from it. "
                f"Install it with: pip install 'invact[{self.name}]'"
            )
