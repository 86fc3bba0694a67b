"""What belongs to Python, to PyTorch or to another library, rather than to who uses it."""

from __future__ import annotations

import sys
import types
from typing import Any

_LIBRARIES = {
    "accelerate", "apex", "bitsandbytes", "datasets", "deepspeed", "einops", "flash_attn", "huggingface_hub", "invact",
    "lightning", "lightning_fabric", "numpy", "open_clip", "pandas", "peft", "PIL", "pytest", "pytorch_lightning",
    "scipy", "sklearn", "timm", "tokenizers", "torch", "torchaudio", "torchvision", "tqdm", "transformers", "triton",
    "xformers", "_pytest",
}  # fmt: skip

# Of the standard library these hold what they are given; others (locks, files, loggers, threads) are left alone.
_HOLDERS = {
    *("argparse", "array", "builtins", "collections", "dataclasses", "enum", "functools", "itertools", "random"),
    *("_thread", "_threading_local", "_weakrefset", "weakref"),  # objects of threads and containers, not locks
}


def of_library(module_name: Any) -> bool:
    """Whether a module is of the standard library or of one that models are built with, by its dotted name."""
    top = module_name.partition(".")[0] if isinstance(module_name, str) else ""
    return top in _LIBRARIES or top in sys.stdlib_module_names


def of_library_itself(value: Any) -> bool:
    """Whether a function, class or module is one that a library defines."""
    if isinstance(value, types.FunctionType):
        return of_library(value.__globals__.get("__name__"))  # functools.wraps changes __module__
    return of_library(value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None))


def is_machinery(cls: type) -> bool:
    """Whether objects of this class belong to Python or PyTorch themselves, rather than to who uses them."""
    module = cls.__module__ if isinstance(cls.__module__, str) else ""
    top = module.partition(".")[0]
    if top in ("ctypes", "_ctypes", "numpy") or module.startswith("torch._"):
        return True
    return (
        top in sys.stdlib_module_names
        and top not in _HOLDERS
        and cls not in (types.SimpleNamespace, types.MappingProxyType)
    )


def is_core(module: Any) -> bool:
    """Whether a module is of the standard library, torch, numpy or invact, by its dotted name."""
    top = module.partition(".")[0] if isinstance(module, str) else ""
    return top in ("torch", "numpy", "invact") or top in sys.stdlib_module_names
