"""The libraries whose models `invact` loads by name and makes example inputs for.

A new library is one file with a `Library` in it, and one line that registers it in `__init__.py`.
Nothing here imports a library: a model's own class says where it comes from.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

ExampleInputs = dict[str, Any] | tuple[Any, ...]
"""A dict is passed to the model as keyword arguments, a tuple as positional ones."""


class RequestError(Exception):
    """What was asked for can not be had; the message says why, and what to do."""


class ModelNameError(RequestError, ValueError):
    """No model goes by the given name."""


class InputSizeError(RequestError, ValueError):
    """A batch, sequence or image size that the model cannot take, or inputs that cannot be made up."""


class AdapterError(RequestError, ValueError):
    """Adapters or a quantisation that the model cannot have."""


class MissingLibraryError(RequestError, ImportError):
    """The library that a model comes from is not installed."""


class Load(Protocol):
    """Builds the model of that name for training, on the meta device, without weights."""

    def __call__(self, name: str, dtype: torch.dtype, image_size: int | None = None) -> nn.Module: ...


class MakeInputs(Protocol):
    """Makes the smallest sensible inputs with which the model's forward gives a training graph."""

    def __call__(
        self,
        model: Any,
        batch_size: int,
        seq_len: int | None = None,
        image_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> ExampleInputs: ...


@dataclass(frozen=True)
class Library:
    """What `invact` needs to know of one library.

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
    """

    name: str
    package: str
    marks: tuple[str, ...]
    load: Load
    example_inputs: MakeInputs
    names: Callable[[], list[str]]
    reads: Callable[[Path], bool]
    as_on_real_tensors: Callable[[Any], AbstractContextManager[None]] = nullcontext

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


libraries: dict[str, Library] = {}
"""Every registered library by its name, in the order in which names are tried."""


def register(library: Library) -> Library:
    """Make a library known to `load`, `example_inputs` and the command line."""
    libraries[library.name] = library
    return library


def library_of(model: nn.Module) -> Library | None:
    """The library whose model this is, or of the model that PEFT has adapted; or None.

    Example:
        >>> import timm
        >>> from invact.patchers import library_of
        >>> library_of(timm.create_model("resnet18")).name
        'timm'
    """
    base = without_adapters(model)
    return next((library for library in libraries.values() if library.owns(base)), None)


def without_adapters(model: nn.Module) -> nn.Module:
    """The model that a `PeftModel` was made of, with its adapted layers; any other as it is.

    What it reads and which loss it takes is told from it: the forward of a `PeftModel` takes any arguments.
    """
    is_peft = any(base.__module__.partition(".")[0] == "peft" for base in type(model).__mro__)
    unwrap = getattr(model, "get_base_model", None) if is_peft else None
    base: nn.Module = model if unwrap is None else unwrap()
    return base


def example_inputs(
    model: nn.Module,
    batch_size: int = 1,
    seq_len: int | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
) -> ExampleInputs:
    """Make inputs for a model of a known library; no random number is drawn.

    The inputs lead to the model's outputs, not to a loss: which loss is taken, and what that keeps for
    backward, is the training loop's business.

    Args:
        model: a Hugging Face, timm or OpenCLIP model, on any device, with PEFT's adapters or without.
        batch_size: samples.
        seq_len: tokens (samples, for models that read raw audio). By default 512, or the longest
            sequence the model takes where that is shorter.
        image_size: pixels to a side. By default what the model was built for.
        device: where the inputs are made.

    Returns:
        Keyword arguments as a dict, or positional ones as a tuple.

    Raises:
        InputSizeError: a size that the model cannot take, or a model that belongs to no known library
            or needs inputs that cannot be made up.

    Example:
        >>> import timm
        >>> from invact.patchers import example_inputs
        >>> [x.shape for x in example_inputs(timm.create_model("resnet18"), batch_size=2)]
        [torch.Size([2, 3, 224, 224])]
    """
    library = library_of(model)
    if library is None:
        raise InputSizeError(
            f"Cannot make example inputs for {type(model).__name__}: it is not a model of "
            f"{', '.join(libraries)}. Pass example_inputs: a dict of keyword arguments or a tuple."
        )
    for what, size in {"batch size": batch_size, "sequence length": seq_len, "image size": image_size}.items():
        if size is not None and size < 1:
            raise InputSizeError(f"The {what} is {size}, but nothing can run on that. Give 1 or more.")
    return library.example_inputs(without_adapters(model), batch_size, seq_len, image_size, device)


@contextmanager
def as_on_real_tensors(inputs: Any) -> Iterator[None]:
    """A block in which the libraries in use treat fake tensors as the real `inputs` that they stand for."""
    with ExitStack() as stack:
        for library in libraries.values():
            if library.package in sys.modules:
                stack.enter_context(library.as_on_real_tensors(inputs))
        yield


def resolve(name: str, library: str | None = None) -> tuple[Library, str]:
    """Find the library that a model name belongs to, and the name as that library knows it.

    A directory goes to the library whose configuration it holds; a prefix such as `timm/` decides;
    otherwise the first library that knows the name has it, and what none knows is taken for a Hugging
    Face hub name.

    Raises:
        ModelNameError: a library that is not known, or a directory that no library can read.

    Example:
        >>> from invact.patchers import resolve
        >>> library, name = resolve("timm/resnet18")
        >>> library.name, name
        ('timm', 'resnet18')
    """
    if library is not None:
        return _named_library(library), name.removeprefix(f"{library}/")
    for known in libraries.values():
        if known.reads(Path(name)):
            return known, name
    prefix, _, rest = name.partition("/")
    if prefix in libraries and rest:
        return libraries[prefix], rest
    for known in libraries.values():
        if known.installed and name in known.names():
            return known, name
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        raise ModelNameError(
            f"{name} is not a directory with a model configuration. Give one that holds config.json "
            f"(transformers, timm) or open_clip_config.json, or a model name."
        )
    return libraries["transformers"], name


def _named_library(name: str) -> Library:
    if name not in libraries:
        raise ModelNameError(f"There is no library {name!r} here. Choose {', '.join(libraries)}.")
    return libraries[name]


def load(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    library: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build a model by name for training: its configuration only, on the meta device, in train mode.

    Args:
        name: `bert-base-uncased`, `timm/vit_base_patch16_224`, `open_clip/ViT-B-32`, a hub name
            `org/name`, or a directory with a configuration.
        dtype: of the parameters.
        library: overrides what the name says.
        image_size: pixels to a side, for models that are built for one size.

    Raises:
        ModelNameError: nothing goes by that name, and the message gives the nearest names; or a directory's
            configuration can not be built.
        MissingLibraryError: the library is not installed; the message gives the pip command.

    Example:
        >>> from invact.patchers import load
        >>> model = load("gpt2")
        >>> sum(p.numel() for p in model.parameters())
        124439808
    """
    owner, own_name = resolve(name, library)
    owner.require()
    try:
        return owner.load(own_name, dtype, image_size).to("meta").train()
    except (InputSizeError, MissingLibraryError, ModelNameError):
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if not Path(own_name).is_dir():
            raise  # a published model that can not be built is a fault here
        why = str(error).strip().partition("\n")[0]
        raise ModelNameError(
            f"{owner.name} makes no model of the configuration in {own_name}: {type(error).__name__}: {why}"
        ) from error


def nearest_names(name: str, candidates: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The candidates that begin with a name, then those most like it; capitals do not matter."""
    by_lowercase = {candidate.lower(): candidate for candidate in candidates}
    completed = sorted((c for c in by_lowercase if c.startswith(name.lower())), key=len)
    alike = difflib.get_close_matches(name.lower(), by_lowercase, n=count, cutoff=cutoff)
    return [by_lowercase[match] for match in dict.fromkeys([*completed, *alike])][:count]


def unknown_name(library: str, name: str, why: str, otherwise: str) -> ModelNameError:
    """The error for a name that a library does not know, with the nearest names of all libraries."""
    near = nearest_names(name, libraries[library].names())
    for other in libraries.values():
        if other.name != library and other.installed:
            near += [f"{other.name}/{match}" for match in nearest_names(name, other.names(), 1, cutoff=0.75)]
    advice = f"Did you mean {' or '.join(near)}? Otherwise {otherwise}" if near else otherwise
    return ModelNameError(f"No {library} model is called {name!r}: {why}. {advice[0].upper()}{advice[1:]}")


def input_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model's first layer expects of a floating input."""
    weights = (p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1)
    return next((weight.dtype for weight in weights if weight.is_floating_point()), torch.float32)


def waves(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Values within [-1, 1] that look random to a model, without touching a random number generator."""
    return torch.arange(math.prod(shape), device=device).sin().to(dtype).view(shape)


def token_ids(batch_size: int, seq_len: int, vocabulary: int, device: torch.device | str) -> torch.Tensor:
    """Token ids from the upper half of the vocabulary, where padding and mask tokens rarely are."""
    first = vocabulary // 2
    ids = first + torch.arange(batch_size * seq_len, device=device) % (vocabulary - first)
    return ids.view(batch_size, seq_len)
