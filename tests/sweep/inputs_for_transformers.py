"""Inputs for transformers models: by invact's own patcher first; where that gives up, by what the model asks for."""

from __future__ import annotations

import inspect

import torch
from invact.patchers.registry import token_ids, waves

from invact import patchers

BATCH = 2
SEQUENCE = 32  # tokens
FRAMES = 64  # of a spectrogram
VOCABULARY = 1024
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
    parameters = inspect.signature(model.forward).parameters
    vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", VOCABULARY)
    # Special tokens are at both ends of the vocabulary.
    inputs = {"input_ids": token_ids(BATCH, SEQUENCE, max(vocabulary // 2, 8), "cpu")}
    if "decoder_input_ids" in parameters and model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if "mm_token_type_ids" in parameters:  # all of it text
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def text_only(model):
    """Text alone, for models that read images or sound besides."""
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError("reads no text")
    return _text(model)


def text_without_cache(model):
    """Text alone, for models whose cache does not stand training."""
    return {**text_only(model), "use_cache": False}


def image_of_its_backbone(model):
    """An image of the size that some part of the configuration names, and a text where the model reads one."""
    parts = [model.config, *_parts(model.config)]
    side = next(vars(part)["image_size"] for part in parts if isinstance(vars(part).get("image_size"), int))
    reads_text = "input_ids" in inspect.signature(model.forward).parameters
    return {**(_text(model) if reads_text else {}), "pixel_values": _values(3, side, side)}


# --- sound --------------------------------------------------------------------------------------------


def with_sound(model):
    """A spectrogram in the first form that the model takes, with text for its decoder."""
    bins = next(
        fields[name]
        for part in [model.config, *_parts(model.config)]
        for fields in [vars(part)]
        for name in ("num_mel_bins", "feature_size", "input_dim", "mel_bins", "n_mels", "input_feat_per_channel")
        if isinstance(fields.get(name), int)
    )
    text = text_only(model) if "input_ids" in inspect.signature(model.forward).parameters else _decoder_text(model)
    for shape in [(BATCH, FRAMES, bins), (BATCH, bins, FRAMES)]:
        inputs = {**text, model.main_input_name: waves(shape, torch.float32, "cpu")}
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:  # the other way round
            continue
        return inputs
    raise ValueError("no form of sound that we know fits")


def sound_wave(model):
    """Raw sound, with text for the decoder."""
    if model.main_input_name != "input_values":
        raise ValueError("reads no raw sound")
    return {**_decoder_text(model), "input_values": _values(SAMPLES)}


def _parts(config) -> list:
    return [value for value in vars(config).values() if hasattr(value, "to_dict")]


def _decoder_text(model) -> dict[str, torch.Tensor]:
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"decoder_input_ids": _text(model)["input_ids"]}


# --- what single architectures ask for ----------------------------------------------------------------


def _patches(model):
    """Pix2Struct: each patch with its row and column before it."""
    patches = _values(16, model.config.vision_config.patch_embed_hidden_size)
    places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], dim=1).expand(BATCH, 16, 2)
    inputs = {"flattened_patches": torch.cat([places, patches], dim=2)}
    return {**_decoder_text(model), **inputs}


def _line_of_text(model):
    return {"pixel_values": _values(3, 48, 320)}


def _values(*shape: int) -> torch.Tensor:
    return waves((BATCH, *shape), torch.float32, "cpu")


def _image(model, *, frames: tuple[int, ...] = (), side: int | None = None) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", None) or model.config
    side = side or vision.image_size
    return _values(*frames, getattr(vision, "num_channels", 3), side, side)


def _boxes(model):
    boxes = torch.tensor([10, 20, 30, 40]).expand(BATCH, SEQUENCE, 4)
    return {**_text(model), "bbox": boxes}


def _float_boxes(model):
    return {**_text(model), "bbox": _values(SEQUENCE, 8)}


def _characters(model):
    return {"input_ids": 97 + torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % 26}


def _queried_image(model):
    """BLIP-2 and its kin: as many image tokens as queries, and a question for the Q-Former."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    frames = (4,) if "video" in type(model).__name__.lower() else ()
    token = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", token) if frames else token
    text = _text(model)
    count = config.num_query_tokens * (frames[0] if frames else 1)
    ids = torch.cat([torch.full((BATCH, count), token), text["input_ids"]], dim=1)
    inputs = {**text, "input_ids": ids, "pixel_values": _image(model, frames=frames)}
    if "qformer_input_ids" in inspect.signature(model.forward).parameters:
        inputs["qformer_input_ids"] = token_ids(BATCH, 8, config.qformer_config.vocab_size, "cpu")
    return inputs


def _interleaved_images(model):
    side = model.config.vision_config.image_size
    seen = torch.ones(BATCH, SEQUENCE, 1, dtype=torch.long)
    return {**_text(model), "pixel_values": _values(1, 3, side, side), "image_attention_mask": seen}


def _embedded_image(model):
    """Kosmos-2: the first tokens give way to the image."""
    mask = torch.zeros(BATCH, SEQUENCE + model.config.latent_query_num, dtype=torch.long)
    mask[:, 1 : 1 + model.config.latent_query_num] = 1
    ids = token_ids(BATCH, mask.shape[1], VOCABULARY // 2, "cpu")
    return {"input_ids": ids, "pixel_values": _image(model), "image_embeds_position_mask": mask}


def _regions(model):
    return {**_text(model), "visual_feats": _values(6, model.config.visual_feat_dim), "visual_pos": _values(6, 4)}


def _image_pairs(model):
    channels = 1 if "LoFTR" in type(model).__name__ else 3
    return {"pixel_values": _values(2, channels, 96, 96)}


def _decoder_codes(model):
    codes = token_ids(BATCH * 8, model.config.decoder_config.num_channels, 64, "cpu")
    return {**_text(model), "decoder_input_ids": codes.view(BATCH, 8, -1)}


def _trajectory(model):
    config = model.config
    return {
        "states": _values(8, config.state_dim),
        "actions": _values(8, config.act_dim),
        "rewards": _values(8, 1),
        "returns_to_go": _values(8, 1),
        "timesteps": torch.arange(8).expand(BATCH, 8),
        "attention_mask": torch.ones(BATCH, 8),
    }


def _time_series(model):
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    features = config.num_time_features
    return {
        "past_values": _values(past),
        "past_time_features": _values(past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": _values(config.prediction_length),
        "future_time_features": _values(config.prediction_length, features),
    }


def _channels_over_time(model):
    config = model.config
    return {"past_values": _values(config.context_length, config.num_input_channels)}


def _waveform(model):
    """Codecs take sound with a channel."""
    return {"input_values": _values(1, SAMPLES)}


def _prompted_image(model):
    points = torch.tensor([10.0, 20.0]).expand(BATCH, 1, 1, 2)
    return {"pixel_values": _image(model), "input_points": points}


def _frames(model):
    return {"pixel_values": _image(model, frames=(getattr(model.config, "num_frames", 4),))}


_SPECIAL = {
    "autoformer": _time_series,
    "blip-2": _queried_image,
    "bros": _float_boxes,
    "canine": _characters,
    "dac": _waveform,
    "decision_transformer": _trajectory,
    "dia": _decoder_codes,
    "efficientloftr": _image_pairs,
    "encodec": _waveform,
    "idefics": _interleaved_images,
    "informer": _time_series,
    "instructblip": _queried_image,
    "instructblipvideo": _queried_image,
    "kosmos-2": _embedded_image,
    "layoutlm": _boxes,
    "layoutlmv3": _boxes,
    "lightglue": _image_pairs,
    "lilt": _boxes,
    "lxmert": _regions,
    "mimi": _waveform,
    "patchtsmixer": _channels_over_time,
    "patchtst": _channels_over_time,
    "pix2struct": _patches,
    "pp_ocrv5_mobile_rec": _line_of_text,
    "pp_ocrv5_server_rec": _line_of_text,
    "pp_ocrv6_small_rec": _line_of_text,
    "pp_ocrv6_tiny_rec": _line_of_text,
    "sam": _prompted_image,
    "superglue": _image_pairs,
    "time_series_transformer": _time_series,
    "timesformer": _frames,
    "videomae": _frames,
    "vivit": _frames,
}


def input_makers(kind: str) -> list:
    """What to try in turn for an architecture."""
    own = [_SPECIAL[kind]] if kind in _SPECIAL else []
    return [
        *own,
        from_patcher,
        with_images,
        with_sound,
        sound_wave,
        image_of_its_backbone,
        text_only,
        text_without_cache,
    ]
