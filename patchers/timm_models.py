"""timm: image models by architecture name, such as `vit_base_patch16_224` or `convnext_base.fb_in22k`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .by_name import unknown_name
from .configurations import directory_config, hub_config
from .library import Library
from .made_up_inputs import input_dtype, waves
from .meta import built_on_meta
from .request_errors import InputSizeError


def names() -> list[str]:
    """Architecture names, without pretrained tags."""
    import timm

    return list(timm.list_models())


def reads(directory: Path) -> bool:
    """Whether the directory holds the config.json that timm writes for the hub."""
    return "architecture" in directory_config(directory, "config.json")


def load(name: str, dtype: torch.dtype, image_size: int | None = None) -> nn.Module:
    """Build a model from an architecture name, a hub name, or a directory with timm's config.json."""
    import timm

    architecture, arguments = _architecture(name)
    published = timm.models.get_pretrained_cfg(architecture)
    if image_size is not None and published is not None and published.fixed_input_size:
        arguments["img_size"] = image_size  # models for any size do not take this argument
    return built_on_meta(lambda: timm.create_model(architecture, **arguments), dtype)


def example_inputs(
    model: Any,
    batch_size: int,
    seq_len: int | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    loss: bool = True,
) -> tuple[torch.Tensor]:
    """One batch of images, of the size that the model was built or published for; timm's models have no loss."""
    if seq_len is not None:
        raise InputSizeError("timm models read images and have no sequence length. Give an image size instead.")
    height, width = (image_size, image_size) if image_size else _image_size(model)
    return (waves((batch_size, _channels(model), height, width), input_dtype(model), device),)


def _architecture(name: str) -> tuple[str, dict[str, Any]]:
    import timm

    if timm.is_model(name.partition(".")[0]):
        return name, {}
    config = _written_config(name)
    arguments = dict(config.get("model_args", {}))
    if "num_classes" in config:
        arguments["num_classes"] = config["num_classes"]
    if not timm.is_model(config.get("architecture", "")):
        raise unknown_name("timm", name, "its config.json names no timm architecture", "pass a timm name.")
    return str(config["architecture"]), arguments


def _written_config(name: str) -> dict[str, Any]:
    if reads(Path(name)):
        return directory_config(name, "config.json")
    if "/" not in name:
        raise unknown_name("timm", name, "timm lists no such architecture", "see timm.list_models().")
    try:
        return hub_config(name, "config.json")
    except LookupError as why:
        raise unknown_name("timm", name, str(why), "pass a directory with its config.json.") from None


def _image_size(model: Any) -> tuple[int, int]:
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = built_for or model.pretrained_cfg["input_size"][1:]
    return height, width


def _channels(model: Any) -> int:
    published = int(model.pretrained_cfg["input_size"][0])
    first = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    # A stem that folds pixels into channels (TResNet 48, CSATv2 64) stands before the first convolution.
    return published if first is None or first.in_channels >= 16 * published else first.in_channels


def checkpoint(model: Any) -> bool:
    """As timm does: PyTorch's checkpointing of each block."""
    if not hasattr(model, "set_grad_checkpointing"):
        return False
    model.set_grad_checkpointing(True)
    return True


LIBRARY = Library(
    name="timm",
    package="timm",
    marks=("pretrained_cfg", "forward_features"),
    load=load,
    example_inputs=example_inputs,
    names=names,
    reads=reads,
    checkpoint=checkpoint,
)
