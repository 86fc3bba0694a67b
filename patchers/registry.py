"""The libraries whose models `invact` loads by name and makes example inputs for.

Nothing here imports a library: a model's own class says where it comes from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .library import ExampleInputs, Library
from .request_errors import InputSizeError

libraries: dict[str, Library] = {}
"""Every registered library by its name, in the order in which names are tried."""


def register(library: Library) -> Library:
    """Make a library known to `load`, `example_inputs` and everything that is planned or fitted without inputs given.

    It comes last: those that were there before are asked first for a name without a prefix. The command line knows only
    those that come with invact. `Library` says what is asked of each part, none of which is tried here.

    Returns:
        The library.

    Raises:
        ValueError: its name is taken, or holds a slash, which would part it from a model's.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from invact.patchers import Library, example_inputs, load, register, unregister
        >>> from invact.patchers.meta import built_on_meta
        >>> class Tiny(nn.Sequential):
        ...     width = 8
        >>> library = register(
        ...     Library(
        ...         name="tiny",
        ...         package="torch",  # of the class, or of one that it derives from
        ...         marks=("width",),
        ...         load=lambda name, dtype, image_size=None: built_on_meta(lambda: Tiny(nn.Linear(8, 8)), dtype),
        ...         example_inputs=lambda model, batch_size, *sizes: (torch.zeros(batch_size, model.width),),
        ...         names=lambda: ["one-layer"],
        ...         reads=lambda directory: False,
        ...     )
        ... )
        >>> model = load("tiny/one-layer", torch.bfloat16)
        >>> model[0].weight.dtype, [x.shape for x in example_inputs(model, batch_size=4)]
        (torch.bfloat16, [torch.Size([4, 8])])
        >>> unregister("tiny")
    """
    if library.name in libraries:
        raise ValueError(f"There is a library called {library.name!r} already. Give yours another name.")
    if "/" in library.name:
        raise ValueError(
            f"A library can not be called {library.name!r}, since a slash parts its name from a model's. "
            "Give it a name without one."
        )
    libraries[library.name] = library
    return library


def unregister(name: str) -> None:
    """Take a library out again.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in libraries:
        raise ValueError(f"There is no library {name!r} here. Those there are: {', '.join(libraries)}.")
    del libraries[name]


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
    loss: bool = True,
) -> ExampleInputs:
    """Make inputs for a model of a known library; no random number is drawn.

    Of a Hugging Face model that can compute its loss from classes, numbers or tokens they lead to that. The others'
    loss, and what it keeps for backward, is the training loop's business.

    Args:
        model: a Hugging Face, timm or OpenCLIP model, on any device, with PEFT's adapters or without.
        batch_size: samples.
        seq_len: tokens (samples, for models that read raw audio). By default 512, or the longest
            sequence the model takes where that is shorter.
        image_size: pixels to a side. By default what the model was built for.
        device: where the inputs are made.
        loss: whether labels are among the inputs, or whatever else the model asks for to compute its loss. Models of
            timm and OpenCLIP have none, and get the same inputs either way.

    Returns:
        Keyword arguments as a dict, or positional ones as a tuple.

    Raises:
        InputSizeError: a size that the model cannot take, or a model that belongs to no known library
            or needs inputs that cannot be made up.

    Example:
        >>> import timm
        >>> from invact import patchers
        >>> from invact.patchers import example_inputs
        >>> [x.shape for x in example_inputs(timm.create_model("resnet18"), batch_size=2)]
        [torch.Size([2, 3, 224, 224])]
        >>> list(example_inputs(patchers.load("gpt2"))), list(example_inputs(patchers.load("gpt2"), loss=False))
        (['input_ids', 'labels'], ['input_ids'])
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
    return library.example_inputs(without_adapters(model), batch_size, seq_len, image_size, device, loss)


@contextmanager
def as_on_real_tensors(inputs: Any) -> Iterator[None]:
    """A block in which the libraries in use treat fake tensors as the real `inputs` that they stand for."""
    with ExitStack() as stack:
        for library in libraries.values():
            if library.package in sys.modules:
                stack.enter_context(library.as_on_real_tensors(inputs))
        yield
