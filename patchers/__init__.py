"""One file per library: load a model by its name, make example inputs for it."""

from . import huggingface, open_clip_models, timm_models
from .registry import (
    ExampleInputs,
    InputSizeError,
    Library,
    MissingLibraryError,
    ModelNameError,
    RequestError,
    as_on_real_tensors,
    example_inputs,
    libraries,
    library_of,
    load,
    register,
    resolve,
)

# A name without a prefix goes to the first of these that knows it: `convnext_base` is timm's and OpenCLIP's.
register(huggingface.LIBRARY)
register(timm_models.LIBRARY)
register(open_clip_models.LIBRARY)

__all__ = [
    "ExampleInputs",
    "InputSizeError",
    "Library",
    "MissingLibraryError",
    "ModelNameError",
    "RequestError",
    "as_on_real_tensors",
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
