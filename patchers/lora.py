"""LoRA adapters, made by PEFT itself, on a model that is there in shapes only."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .request_errors import AdapterError, MissingLibraryError

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output embeddings."""

_MOST_NAMED = 12


def with_lora(
    model: nn.Module, rank: int, dropout: float = 0.0, targets: str | Sequence[str] = ALL_LINEAR
) -> nn.Module:
    """The model with LoRA adapters, as PEFT's `get_peft_model` gives it: all else is frozen, and it is in train mode.

    The adapters lie where the model lies; on the meta device they take no memory. They have the dtype that PEFT gives
    them: float32 for a model in 16 bits, the model's own otherwise. The model itself is changed, as PEFT does that:
    each targeted layer is wrapped.

    Args:
        model: of any library whose layers PEFT adapts, best on the meta device.
        rank: of every adapter, 1 or more.
        dropout: of what the adapters read, within [0, 1).
        targets: "all-linear", or the names of the layers, as they end: `["q_proj", "v_proj"]`.

    Raises:
        AdapterError: a rank or a dropout that is none, a name that no layer has, or a layer that PEFT does not adapt.
        MissingLibraryError: PEFT is not installed; the message gives the pip command.

    Example:
        >>> from invact.patchers import load, with_lora
        >>> model = with_lora(load("gpt2", torch.bfloat16), rank=8)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        1179648
        >>> {p.dtype for p in model.parameters() if p.requires_grad}
        {torch.float32}
    """
    _check(rank, dropout)
    _check_targets(model, targets)
    from peft import LoraConfig, get_peft_model

    names = ALL_LINEAR if targets == ALL_LINEAR else list(targets)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # On the model's own device PEFT would first make them on the CPU. What it warns of, it also puts right.
    with torch.device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            adapted = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=names))
        except (TypeError, ValueError) as error:
            why = str(error).strip().partition("\n")[0].rstrip(".")
            raise AdapterError(
                f"PEFT makes no LoRA adapters for {type(model).__name__}: {why}. {_layers_in_words(model)}"
            ) from error
    trained: nn.Module = adapted.train()
    return trained


def lora_in_words(rank: int, dropout: float = 0.0, targets: str | Sequence[str] = ALL_LINEAR) -> str:
    """As a title says it.

    Example:
        >>> lora_in_words(16), lora_in_words(8, 0.05, ["q_proj", "v_proj"])
        ('LoRA rank 16 on all linear layers', 'LoRA rank 8, dropout 0.05, on q_proj and v_proj')
    """
    with_dropout = f", dropout {dropout:g}," if dropout else ""
    *others, last = ["all linear layers"] if targets == ALL_LINEAR else targets
    return f"LoRA rank {rank}{with_dropout} on {', '.join(others)}{' and ' if others else ''}{last}"


def _check(rank: int, dropout: float) -> None:
    if importlib.util.find_spec("peft") is None:
        raise MissingLibraryError(
            "peft is not installed, and LoRA adapters come from it. Install it with: pip install 'invact[lora]'"
        )
    if rank < 1:
        raise AdapterError(f"The LoRA rank is {rank}, and an adapter of that rank has no weights. Give 1 or more.")
    if not 0 <= dropout < 1:
        raise AdapterError(
            f"The LoRA dropout is {dropout:g}, but it is the share of what an adapter reads that is dropped. "
            "Give 0 or more and less than 1."
        )


def _check_targets(model: nn.Module, targets: str | Sequence[str]) -> None:
    """Refuses names that PEFT would pass over in silence where another one is found."""
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise AdapterError(f"{targets!r} is no list of names. Give {ALL_LINEAR!r}, or a list such as [{targets!r}].")
    if targets == ALL_LINEAR:
        if not any(True for _ in _linear_layers(model)):
            raise AdapterError(f"{type(model).__name__} has no linear layer, so {ALL_LINEAR} has nothing to adapt.")
        return
    paths = [f".{path}" for path, _ in model.named_modules() if path]
    missing = [name for name in targets if not any(path.endswith(f".{name}") for path in paths)]
    if missing or not targets:
        called = f"is called {' or '.join(missing)}" if missing else "was named"
        raise AdapterError(f"No layer of {type(model).__name__} {called}. {_layers_in_words(model)}")


def _layers_in_words(model: nn.Module) -> str:
    names = list(dict.fromkeys(_last_part(path) for path, _ in _linear_layers(model)))
    if not names:
        return "It has no linear layers."
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"Its linear layers are {', '.join(names[:_MOST_NAMED])}{more}; {ALL_LINEAR} takes them all."


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that PEFT's "all-linear" takes: GPT-2's `Conv1D` is one, the output embeddings are none."""
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if module is not embeddings and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            yield path, module


def _last_part(path: str) -> str:
    """The name that stands for this layer in every block; in a `Sequential`, with what the `Sequential` is called."""
    around, _, name = path.rpartition(".")
    return f"{around.rpartition('.')[2]}.{name}" if name.isdigit() and around else name
