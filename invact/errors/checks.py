"""Checks of what the public functions are given, so that bad input gets one clear error."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from invact.pytorch.containers import tree_leaves

Inputs = tuple[Any, ...] | dict[str, Any]
"""How a model is called: a dict holds keyword arguments, a tuple positional ones."""


def check_model(model: Any) -> None:
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(
            f"invact needs a model, but got the class {model.__name__} itself. "
            f"Pass an object of it, as `{model.__name__}(...)` makes one."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"invact needs a torch.nn.Module, but got {type(model).__name__}. "
            "Pass the model itself, for example `trainer.model`."
        )
    check_not_sharded(model)


def check_not_sharded(model: nn.Module) -> None:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    kinds = tuple(getattr(fsdp, name) for name in ("FSDPModule", "FullyShardedDataParallel") if hasattr(fsdp, name))
    if any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            "This model is already sharded by FSDP, whose own hooks can not run in a trial forward pass. "
            "Patch it first and shard it afterwards: the inverted activations stay."
        )


def check_trainable_here(model: nn.Module) -> None:
    """Refuses what can not be trained, or not be tried out, as it is.

    Raises:
        ValueError: says why, and what to do first.
    """
    check_shapes_known(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "The model is planned inside torch.inference_mode, where autograd keeps nothing and nothing can be "
            "trained. Leave that block first; torch.no_grad() is no obstacle."
        )
    for path, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                f"`{path}` was made inside torch.inference_mode, so autograd refuses it and the model can not be "
                "trained. Make the model, or load its weights, outside that block; torch.no_grad() is no obstacle."
            )
    _check_weights_at_hand(model)


def _check_weights_at_hand(model: nn.Module) -> None:
    named = dict(model.named_parameters())
    meta = [path for path, p in named.items() if p.is_meta]
    # A model that is on meta as a whole is one that was never loaded, unless accelerate has put hooks on it.
    whole = len(meta) == len(named) and not any(hasattr(module, "_hf_hook") for module in model.modules())
    away = [path for path, p in named.items() if hasattr(p, "ds_id")] or ([] if whole else meta)
    if away:
        raise ValueError(
            f"`{away[0]}` is not here: hooks fetch it when it is needed, as accelerate's offloading and DeepSpeed's "
            "ZeRO-3 do, or it was never loaded, so the model can not be tried out. Patch it while all its parameters "
            "are in place: it stays patched when they are taken away."
        )


def check_shapes_known(model: nn.Module) -> None:
    """Refuses a model with lazy layers that have seen no input: a simulated one would fix their shapes.

    Raises:
        ValueError: names the first parameter or buffer without a shape.
    """
    for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"`{path}` has no shape yet, since its lazy layer takes that from the first input it sees: run the "
                "model once on real inputs first."
            )


def check_inputs(inputs: Any) -> None:
    if not isinstance(inputs, (tuple, dict)):
        raise TypeError(
            f"example_inputs is of type {type(inputs).__name__}, but it must say how the model is called. "
            f"{_how_to_wrap(inputs)}"
        )
    if isinstance(inputs, dict):
        _check_keywords(inputs)
    if not holds_a_tensor(inputs):
        raise TypeError(
            f"example_inputs is {_shortened(inputs)}, which holds no tensor, so there is nothing to compute with. "
            "Pass tensors as the model takes them in training, such as `(torch.randn(8, 64),)` or "
            "`dict(input_ids=torch.zeros(8, 128, dtype=torch.long))`."
        )
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor) and tensor.is_complex():
            raise TypeError(
                "example_inputs holds a complex tensor, and a pointwise activation of complex numbers is not "
                "invertible by one bit. Pass inputs of a real floating dtype."
            )


def holds_a_tensor(inputs: Inputs) -> bool:
    """False where everything is text, a number, an array or None; an object of another kind may hold one.

    A model that is called with nothing at all is given the benefit of the doubt.
    """
    leaves = tree_leaves(inputs)
    return not leaves or not all(_is_plain(leaf) for leaf in leaves)


def _is_plain(leaf: Any) -> bool:
    # numpy's arrays and numbers, by name: numpy need not be installed.
    return leaf is None or isinstance(leaf, (str, bytes, int, float)) or type(leaf).__module__ == "numpy"


def _how_to_wrap(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return "Pass a tuple of positional arguments: `(x,)` for this one tensor."
    if isinstance(inputs, list):
        return "Pass a tuple of positional arguments: `tuple(inputs)`, or `(inputs,)` if the model takes a list."
    if isinstance(inputs, Mapping):
        return "Pass a dict of keyword arguments: `dict(inputs)`."
    return (
        "Pass a tuple of positional arguments, such as `(x,)`, or a dict of keyword arguments, such as "
        "`dict(input_ids=...)`."
    )


def _check_keywords(inputs: dict[Any, Any]) -> None:
    for key in inputs:
        if not isinstance(key, str):
            raise TypeError(
                f"example_inputs is a dict with the key {_shortened(key)}, but its keys are the names of the forward's "
                "arguments. Pass a dict such as `dict(input_ids=...)`, or `(inputs,)` if the model takes a dict."
            )


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_autocast(autocast: Any) -> None:
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(
            f"autocast is {autocast!r}, but torch.autocast trains in one of two dtypes. "
            "Pass torch.bfloat16, torch.float16 or None."
        )


def check_exact(exact: Any) -> None:
    """True or False.

    Raises:
        TypeError: anything else, so that a number of bits, say, is not taken for True.
    """
    if not isinstance(exact, bool):
        raise TypeError(
            f"exact is {_shortened(exact)}, but it is a switch: with True nothing is inverted, activations are derived "
            "instead. Pass True or False."
        )


def check_few_bits(few_bits: Any, exact: bool = False) -> None:
    """None, or the bits per element that approximate derivatives may keep: 1 to 4.

    Raises:
        TypeError: no whole number.
        ValueError: another number, or one together with `exact`.
    """
    if few_bits is None:
        return
    if isinstance(few_bits, bool) or not isinstance(few_bits, int):
        raise TypeError(
            f"few_bits is {_shortened(few_bits)}, but it is the number of bits kept per element for an approximate "
            "derivative. Pass 1, 2, 3 or 4, or None for none."
        )
    if not 1 <= few_bits <= 4:
        raise ValueError(
            f"few_bits is {few_bits}, but an approximate derivative is kept in 1 to 4 bits per element. "
            "Pass one of these, or None for none."
        )
    if exact:
        raise ValueError(
            f"exact=True asks for gradients that are bit for bit the stock ones, and few_bits={few_bits} for "
            "approximate ones. Leave one of them out."
        )


def check_patterns(include: Any, exclude: Any) -> None:
    """Each None, a glob pattern, or several of them in a list, tuple or set.

    Raises:
        TypeError: anything else, with what to pass.

    Example:
        >>> check_patterns("encoder.*", ["lm_head.*", "*.act"])
    """
    for option, patterns in {"include": include, "exclude": exclude}.items():
        if patterns is None or isinstance(patterns, str):
            continue
        several = isinstance(patterns, Collection) and not isinstance(patterns, (bytes, Mapping, Tensor))
        if not several or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"{option} is {_shortened(patterns)}, but sites are chosen by glob patterns over their paths. "
                f"Pass a string, such as {option}='*.mlp.act', or a list of strings."
            )
