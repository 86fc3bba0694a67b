"""What inputs for transformers models are made of: text, numbers, images, and the parts of a configuration."""

from __future__ import annotations

import inspect

import torch

from invact.patchers.made_up_inputs import token_ids, waves

BATCH = 2
SEQUENCE = 32  # tokens
VOCABULARY = 1024
SAMPLES = 7680  # of raw sound: about half a second at 16 kHz, and four tokens of a codec


def text_for(model) -> dict[str, torch.Tensor]:
    parameters = inspect.signature(model.forward).parameters
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", VOCABULARY)
    # Special tokens are at both ends of the vocabulary.
    inputs = {"input_ids": token_ids(BATCH, SEQUENCE, max(vocabulary // 2, 8), "cpu")}
    if "decoder_input_ids" in parameters and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if "mm_token_type_ids" in parameters:  # all of it text
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def first_that_runs(model, candidates: list[dict]) -> dict:
    for inputs in candidates:
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:  # another form
            continue
        return inputs
    raise ValueError("no form that we know fits")


def parts_of(config) -> list:
    return [value for value in vars(config).values() if hasattr(value, "to_dict")]


def decoder_text(model) -> dict[str, torch.Tensor]:
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"decoder_input_ids": text_for(model)["input_ids"]}


def values(*shape: int) -> torch.Tensor:
    return waves_of(BATCH, *shape)


def waves_of(*shape: int) -> torch.Tensor:
    return waves(shape, torch.float32, "cpu")


def image_for(model, *, frames: tuple[int, ...] = (), side: int | None = None) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", None) or model.config
    side = side or vision.image_size
    return values(*frames, getattr(vision, "num_channels", 3), side, side)
