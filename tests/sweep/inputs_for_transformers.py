"""Inputs for transformers models: by invact's own patcher first; where that gives up, by what the model asks for."""

from __future__ import annotations

import inspect

import torch
from invact.patchers.registry import token_ids, waves

from invact import patchers

BATCH = 2
SEQUENCE = 32  # tokens
SAMPLES = 8000  # of raw sound: half a second at 16 kHz


def from_patcher(model):
    """What `invact.patch(model)` itself would make up, at a small size."""
    length = SAMPLES if model.main_input_name == "input_values" else SEQUENCE
    try:
        return patchers.example_inputs(model, batch_size=BATCH, seq_len=length)
    except patchers.InputSizeError as error:
        if "no sequence length" not in str(error):
            raise
        return patchers.example_inputs(model, batch_size=BATCH)


# --- text and images ----------------------------------------------------------------------------------


def with_images(model):
    """One image before each text, as many image tokens as the model makes features of it."""
    token = next(
        getattr(model.config, name)
        for name in ("image_token_id", "image_token_index")
        if isinstance(getattr(model.config, name, None), int)
    )
    for images in _images(model):
        try:
            with torch.no_grad():
                features = _tensors(model.get_image_features(**images))
        except Exception:  # another form of image
            continue
        text = _text(model)
        width = features[0].shape[-1]
        count = sum(f.numel() for f in features) // width // BATCH
        ids = torch.cat([torch.full((BATCH, count), token), text["input_ids"]], dim=1)
        inputs = {**text, "input_ids": ids, **images}
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["mm_token_type_ids"] = (ids == token).int()
        if "token_type_ids" in inspect.signature(model.forward).parameters:
            inputs["token_type_ids"] = (ids == token).int()
        return inputs
    raise ValueError("no form of image that we know fits")


def _images(model):
    """Images in the forms that transformers' processors give them."""
    vision = getattr(model.config, "vision_config", None)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    size = getattr(vision, "image_size", None) or 56
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    yield {"pixel_values": waves((BATCH, channels, height, width), torch.float32, "cpu")}
    patch = getattr(vision, "patch_size", 14)
    if isinstance(patch, int):
        depth = channels * getattr(vision, "temporal_patch_size", 1) * patch**2
        grid = {"image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH)}
        yield {"pixel_values": waves((BATCH * 16, depth), torch.float32, "cpu"), **grid}
        yield {"pixel_values": waves((BATCH * 16, channels, patch, patch), torch.float32, "cpu"), **grid}
    tiles = waves((BATCH, 3, channels, height, width), torch.float32, "cpu")
    yield {"pixel_values": tiles, "image_sizes": torch.tensor([[height, 2 * width]] * BATCH)}
    yield {"pixel_values": tiles[:, :1], "image_sizes": torch.tensor([[height, width]] * BATCH)}
    yield {"pixel_values": tiles[:, :1]}


def _tensors(found) -> list[torch.Tensor]:
    found = getattr(found, "pooler_output", found)
    if isinstance(found, torch.Tensor):
        return [found]
    return [t for item in found for t in _tensors(item)]


def _text(model) -> dict[str, torch.Tensor]:
    config = model.config.get_text_config(decoder=True)
    # Special tokens are at both ends of the vocabulary.
    inputs = {"input_ids": token_ids(BATCH, SEQUENCE, max(config.vocab_size // 2, 8), "cpu")}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


def text_only(model):
    """Text alone, for models that read images or sound besides."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError("reads no text")
    return _text(model)


def text_without_cache(model):
    """Text alone, for models whose cache does not stand training."""
    return {**text_only(model), "use_cache": False}


input_makers = [from_patcher, with_images, text_only, text_without_cache]
