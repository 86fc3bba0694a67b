"""Patches nothing: one file per library, which loads a model by its name and makes example inputs for it."""

from . import huggingface, open_clip_models, timm_models
from .by_name import load, resolve
from .library import ExampleInputs, Library
from .lora import lora_in_words, with_lora
from .quantized import with_4bit_base
from .registry import (
    as_on_real_tensors,
    example_inputs,
    libraries,
    library_of,
    register,
    unregister,
    without_adapters,
)
from .request_errors import AdapterError, InputSizeError, MissingLibraryError, ModelNameError, RequestError

# A name without a prefix goes to the first of these that knows it: `convnext_base` is timm's and OpenCLIP's.
register(huggingface.LIBRARY)
register(timm_models.LIBRARY)
register(open_clip_models.LIBRARY)

__all__ = [
    "AdapterError",
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
    "lora_in_words",
    "open_clip_models",
    "register",
    "resolve",
    "timm_models",
    "unregister",
    "with_4bit_base",
    "with_lora",
    "without_adapters",
]
