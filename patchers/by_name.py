"""A model by its name: whose it is, how that library builds it, and the names nearest to one that none knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .library import Library
from .registry import libraries
from .request_errors import InputSizeError, MissingLibraryError, ModelNameError


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
