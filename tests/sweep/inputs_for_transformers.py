"""Inputs for transformers models: by invact's own patcher first; where that gives up, by what the model asks for."""

from __future__ import annotations

import inspect

import torch
from made_up_inputs import BATCH, SAMPLES, SEQUENCE, decoder_text, first_that_runs, parts_of, text_for, values, waves_of
from single_architectures import SPECIAL

from invact import patchers
from invact.patchers.made_up_inputs import waves

FRAMES = 64  # of a spectrogram


def from_patcher(model):
    """What `invact.patch(model)` itself would make up, at a small size."""
    length = SAMPLES if model.main_input_name == "input_values" else SEQUENCE
    try:
        return patchers.example_inputs(model, batch_size=BATCH, seq_len=length, loss=False)
    except patchers.InputSizeError as error:
        if "no sequence length" not in str(error):
            raise
        return patchers.example_inputs(model, batch_size=BATCH, loss=False)


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
        text = text_for(model)
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


def text_only(model):
    """Text alone, for models that read images or sound besides."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError("reads no text")
    return text_for(model)


def text_without_cache(model):
    """Text alone, for models whose cache does not stand training."""
    return {**text_only(model), "use_cache": False}


def image_of_its_backbone(model):
    """An image of the size that some part of the configuration names, and a text where the model reads one."""
    parts = [model.config, *parts_of(model.config)]
    side = next(vars(part)["image_size"] for part in parts if isinstance(vars(part).get("image_size"), int))
    reads_text = "input_ids" in inspect.signature(model.forward).parameters
    return {**(text_for(model) if reads_text else {}), "pixel_values": values(3, side, side)}


def patches_on_a_grid(model):
    """Cut images in one row, and how many patches each has in time, height and width."""
    parameters = inspect.signature(model.forward).parameters
    grid = next(name for name in ("grid_thw", "image_grid_thw") if name in parameters)
    patches = next(name for name in ("hidden_states", "pixel_values") if name in parameters)
    config, fields = model.config, vars(model.config)
    channels = next(
        fields[name] for name in ("in_channels", "num_channels", "in_chans", "hidden_act") if name in fields
    )
    channels = channels if isinstance(channels, int) else 3
    side = config.patch_size
    depth = channels * fields.get("temporal_patch_size", fields.get("patch_temporal", 1)) * side**2
    inputs = {grid: torch.tensor([[1, 4, 4]] * BATCH)}
    if "merge_sizes" in parameters:
        inputs["merge_sizes"] = torch.ones(BATCH, dtype=torch.long)
    shapes = [(BATCH * 16, depth), (BATCH * 16, channels, side, side), (1, BATCH * 16, depth), (BATCH, 16, depth)]
    return first_that_runs(model, [{**inputs, patches: waves_of(*shape)} for shape in shapes])


def patches_with_a_mask(model):
    """Cut images, each in a row of its own with a mask, and their sizes in patches."""
    if "spatial_shapes" not in inspect.signature(model.forward).parameters:
        raise ValueError("takes no spatial shapes")
    vision = getattr(model.config, "vision_config", model.config)
    return {
        **(text_only(model) if "input_ids" in inspect.signature(model.forward).parameters else {}),
        "pixel_values": values(16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }


def video(model):
    """A few frames, with a text where the model reads one."""
    if "pixel_values_videos" not in inspect.signature(model.forward).parameters:
        raise ValueError("sees no videos")
    parts = [model.config, *parts_of(model.config)]
    found = {name: value for part in reversed(parts) for name, value in vars(part).items()}
    side = next(found[name] for name in ("crop_size", "image_size") if name in found)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    frames = next((found[name] for name in ("num_frames", "frames_per_clip") if name in found), 4)
    text = text_for(model) if "input_ids" in inspect.signature(model.forward).parameters else {}
    return {**text, "pixel_values_videos": values(min(frames, 16), 3, height, width)}


def image_of_two_sides(model):
    """An image of the height and width that some part of the configuration names."""
    sizes = [vars(part).get("image_size") for part in [model.config, *parts_of(model.config)]]
    height, width = next(tuple(size) for size in sizes if isinstance(size, (tuple, list)))
    return {"pixel_values": values(3, height, width)}


# --- sound --------------------------------------------------------------------------------------------


def with_sound(model):
    """A spectrogram in the first form that the model takes, with text for its decoder."""
    bins = next(
        fields[name]
        for part in [model.config, *parts_of(model.config)]
        for fields in [vars(part)]
        for name in ("num_mel_bins", "feature_size", "input_dim", "mel_bins", "n_mels", "input_feat_per_channel")
        if isinstance(fields.get(name), int)
    )
    text = text_only(model) if "input_ids" in inspect.signature(model.forward).parameters else decoder_text(model)
    for shape in [(BATCH, FRAMES, bins), (BATCH, bins, FRAMES)]:
        inputs = {**text, model.main_input_name: waves(shape, torch.float32, "cpu")}
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:  # the other way round
            continue
        return inputs
    raise ValueError("no form of sound that we know fits")


def masked_sound(model):
    """A spectrogram, with the mask of what is sound in it where the model wants one."""
    parameters = inspect.signature(model.forward).parameters
    name = next(name for name in ("input_features", "audio_mel") if name in parameters)
    mask = next((mask for mask in (f"{name}_mask", "attention_mask") if mask in parameters), None)
    fields = {key: value for part in [model.config, *parts_of(model.config)] for key, value in vars(part).items()}
    bins = {fields[key] for key in _BINS if isinstance(fields.get(key), int)} | {80, 128, 320}
    text = text_only(model) if "input_ids" in parameters else decoder_text(model)
    candidates = []
    for count in sorted(bins):
        for frames in (FRAMES, 2 * fields.get("max_source_positions", FRAMES)):
            for shape in [(BATCH, frames, count), (BATCH, count, frames), (BATCH, 1, frames, count)]:
                inputs = {**text, name: waves_of(*shape)}
                if mask is not None and "input_ids" not in parameters:
                    # Gemma 3n marks what is padding, the others what is not.
                    candidates.append({**inputs, mask: torch.full((BATCH, frames), name != "audio_mel")})
                candidates.append(inputs)
    return first_that_runs(model, candidates)


_BINS = (
    "num_mel_bins",
    "feature_size",
    "input_dim",
    "mel_bins",
    "n_mels",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "input_feat_size",
)


def one_channel_of_sound(model):
    """Raw sound with its one channel, as codecs take it, with features or tokens where the model reads them as well."""
    parameters = inspect.signature(model.forward).parameters
    name = next(name for name in ("input_values", "hidden_states") if name in parameters)
    inputs = {name: values(1, SAMPLES)}
    if "input_ids" in parameters:
        inputs |= text_for(model)
    if "input_features" in parameters:
        return first_that_runs(model, [{**inputs, "input_features": values(24, bins)} for bins in (160, 80, 1024)])
    return inputs


def latents(model):
    """What the encoder of a codec gives its decoder."""
    name = next(name for name in ("latents", "hidden_states") if name in inspect.signature(model.forward).parameters)
    widths = {value for value in vars(model.config).values() if isinstance(value, int) and 8 <= value <= 2048}
    shapes = [shape for width in sorted(widths) for shape in [(width, 16), (16, width)]]
    return first_that_runs(model, [{name: values(*shape)} for shape in shapes])


def sound_wave(model):
    """Raw sound, with text for the decoder."""
    if model.main_input_name != "input_values":
        raise ValueError("reads no raw sound")
    return {**decoder_text(model), "input_values": values(SAMPLES)}


# --- what single architectures ask for ----------------------------------------------------------------


def input_makers(kind: str) -> list:
    """What to try in turn for an architecture."""
    own = [SPECIAL[kind]] if kind in SPECIAL else []
    return [
        *own,
        from_patcher,
        with_images,
        with_sound,
        sound_wave,
        patches_on_a_grid,
        patches_with_a_mask,
        video,
        image_of_two_sides,
        masked_sound,
        one_channel_of_sound,
        latents,
        image_of_its_backbone,
        text_only,
        text_without_cache,
    ]
