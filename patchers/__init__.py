"""One file per library: load a model by its name, make example inputs for it."""

from . import huggingface, open_clip_models, timm_models
from .adapters import lora_in_words, with_lora
from .quantized import with_4bit_base
from .registry import (
    AdapterError,
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
    without_adapters,
)

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
    "with_4bit_base",
    "with_lora",
    "without_adapters",
]
