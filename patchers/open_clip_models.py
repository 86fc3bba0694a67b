"""OpenCLIP: image and text towers trained together, by names such as `ViT-B-32`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from . import huggingface
from .by_name import unknown_name
from .configurations import directory_config, hub_config
from .library import Library
from .made_up_inputs import input_dtype, token_ids, waves
from .meta import built_on_meta
from .request_errors import InputSizeError

CONFIG_FILE = "open_clip_config.json"
_TOKENS = 77  # as OpenCLIP's tokenizer gives for a text tower from transformers, whatever that could read


def names() -> list[str]:
    """The architectures whose configuration comes with OpenCLIP."""
    import open_clip

    return list(open_clip.list_models())


def reads(directory: Path) -> bool:
    """Whether the directory holds the configuration that OpenCLIP writes for the hub."""
    return "model_cfg" in directory_config(directory, CONFIG_FILE)


def load(name: str, dtype: torch.dtype, image_size: int | None = None) -> nn.Module:
    """Build a model from an OpenCLIP name, a hub name, or a directory with open_clip_config.json."""
    import open_clip

    config = open_clip.get_model_config(name) if name in names() else _written_config(name)["model_cfg"]
    with TemporaryDirectory() as directory:
        text_tower = config["text_cfg"]
        if "hf_model_name" in text_tower:  # OpenCLIP would ask the hub, even for what needs no asking
            _write(directory, "config.json", huggingface.config_fields(text_tower["hf_model_name"]))
            text_tower["hf_model_name"] = directory
        _write(directory, CONFIG_FILE, {"model_cfg": config})
        create = partial(
            open_clip.create_model,
            f"local-dir:{directory}",
            device="meta",  # else OpenCLIP moves the model to the CPU, which a meta tensor refuses
            load_weights=False,
            pretrained_text=False,
            force_image_size=image_size,
        )
        return built_on_meta(create, dtype)


def example_inputs(
    model: Any,
    batch_size: int,
    seq_len: int | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    loss: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of images and of texts, as many of each; OpenCLIP's models have no loss of their own."""
    free = _has_text_tower_of_transformers(model)
    tokens = (seq_len or _TOKENS) if free else int(model.context_length)
    if seq_len is not None and seq_len != tokens:
        raise InputSizeError(
            f"This OpenCLIP model reads texts of exactly {tokens} tokens, not {seq_len}. Leave the sequence length out."
        )
    size = image_size or model.visual.image_size
    height, width = size if isinstance(size, tuple | list) else (size, size)
    vocabulary = next(layer for layer in model.modules() if isinstance(layer, nn.Embedding)).num_embeddings
    return (
        waves((batch_size, 3, height, width), input_dtype(model), device),
        token_ids(batch_size, tokens, vocabulary, device),
    )


def _has_text_tower_of_transformers(model: Any) -> bool:
    from open_clip.hf_model import HFTextEncoder

    return isinstance(getattr(model, "text", None), HFTextEncoder)


def _written_config(name: str) -> dict[str, Any]:
    if reads(Path(name)):
        return directory_config(name, CONFIG_FILE)
    if "/" not in name:
        raise unknown_name("open_clip", name, "OpenCLIP lists no such model", "see open_clip.list_models().")
    try:
        return hub_config(name, CONFIG_FILE)
    except LookupError as why:
        raise unknown_name("open_clip", name, str(why), f"pass a directory with its {CONFIG_FILE}.") from None


def _write(directory: str, filename: str, config: dict[str, Any]) -> None:
    (Path(directory) / filename).write_text(json.dumps(config), encoding="utf-8")


def checkpoint(model: Any) -> bool:
    """As OpenCLIP does: PyTorch's checkpointing of each block."""
    if not hasattr(model, "set_grad_checkpointing"):
        return False
    model.set_grad_checkpointing(True)
    return True


LIBRARY = Library(
    name="open_clip",
    package="open_clip",
    marks=("visual", "context_length"),
    load=load,
    example_inputs=example_inputs,
    names=names,
    reads=reads,
    checkpoint=checkpoint,
)
