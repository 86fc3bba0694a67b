"""One file per library: load a model by its name, make example inputs for it."""

from . import huggingface, open_clip_models, timm_models  # each registers its library
from .registry import (
    ExampleInputs,
    InputSizeError,
    Library,
    MissingLibraryError,
    ModelNameError,
    example_inputs,
    libraries,
    library_of,
    load,
    register,
    resolve,
)

__all__ = [
    "ExampleInputs",
    "InputSizeError",
    "Library",
    "MissingLibraryError",
    "ModelNameError",
    "example_inputs",
    "huggingface",
    "libraries",
    "library_of",
    "load",
    "open_clip_models",
    "register",
    "resolve",
    "timm_models",
]
