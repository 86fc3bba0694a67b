"""Inputs for transformers models: by invact's own patcher first; where that gives up, by what the model asks for."""

from __future__ import annotations

import inspect

import torch
from invact.patchers.made_up_inputs import token_ids, waves

from invact import patchers

BATCH = 2
SEQUENCE = 32  # tokens
FRAMES = 64  # of a spectrogram
VOCABULARY = 1024
SAMPLES = 7680  # of raw sound: about half a second at 16 kHz, and four tokens of a codec


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
    return _first_that_runs(model, [{**inputs, patches: _waves(*shape)} for shape in shapes])


def patches_with_a_mask(model):
    """Cut images, each in a row of its own with a mask, and their sizes in patches."""
    if "spatial_shapes" not in inspect.signature(model.forward).parameters:
        raise ValueError("takes no spatial shapes")
    vision = getattr(model.config, "vision_config", model.config)
    return {
        **(text_only(model) if "input_ids" in inspect.signature(model.forward).parameters else {}),
        "pixel_values": _values(16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
    }


def video(model):
    """A few frames, with a text where the model reads one."""
    if "pixel_values_videos" not in inspect.signature(model.forward).parameters:
        raise ValueError("sees no videos")
    parts = [model.config, *_parts(model.config)]
    found = {name: value for part in reversed(parts) for name, value in vars(part).items()}
    side = next(found[name] for name in ("crop_size", "image_size") if name in found)
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    frames = next((found[name] for name in ("num_frames", "frames_per_clip") if name in found), 4)
    text = _text(model) if "input_ids" in inspect.signature(model.forward).parameters else {}
    return {**text, "pixel_values_videos": _values(min(frames, 16), 3, height, width)}


def image_of_two_sides(model):
    """An image of the height and width that some part of the configuration names."""
    sizes = [vars(part).get("image_size") for part in [model.config, *_parts(model.config)]]
    height, width = next(tuple(size) for size in sizes if isinstance(size, (tuple, list)))
    return {"pixel_values": _values(3, height, width)}


def _first_that_runs(model, candidates: list[dict]) -> dict:
    for inputs in candidates:
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception:  # another form
            continue
        return inputs
    raise ValueError("no form that we know fits")


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


def masked_sound(model):
    """A spectrogram, with the mask of what is sound in it where the model wants one."""
    parameters = inspect.signature(model.forward).parameters
    name = next(name for name in ("input_features", "audio_mel") if name in parameters)
    mask = next((mask for mask in (f"{name}_mask", "attention_mask") if mask in parameters), None)
    fields = {key: value for part in [model.config, *_parts(model.config)] for key, value in vars(part).items()}
    bins = {fields[key] for key in _BINS if isinstance(fields.get(key), int)} | {80, 128, 320}
    text = text_only(model) if "input_ids" in parameters else _decoder_text(model)
    candidates = []
    for count in sorted(bins):
        for frames in (FRAMES, 2 * fields.get("max_source_positions", FRAMES)):
            for shape in [(BATCH, frames, count), (BATCH, count, frames), (BATCH, 1, frames, count)]:
                inputs = {**text, name: _waves(*shape)}
                if mask is not None and "input_ids" not in parameters:
                    # Gemma 3n marks what is padding, the others what is not.
                    candidates.append({**inputs, mask: torch.full((BATCH, frames), name != "audio_mel")})
                candidates.append(inputs)
    return _first_that_runs(model, candidates)


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
    inputs = {name: _values(1, SAMPLES)}
    if "input_ids" in parameters:
        inputs |= _text(model)
    if "input_features" in parameters:
        return _first_that_runs(model, [{**inputs, "input_features": _values(24, bins)} for bins in (160, 80, 1024)])
    return inputs


def latents(model):
    """What the encoder of a codec gives its decoder."""
    name = next(name for name in ("latents", "hidden_states") if name in inspect.signature(model.forward).parameters)
    widths = {value for value in vars(model.config).values() if isinstance(value, int) and 8 <= value <= 2048}
    shapes = [shape for width in sorted(widths) for shape in [(width, 16), (16, width)]]
    return _first_that_runs(model, [{name: _values(*shape)} for shape in shapes])


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


def _document(model):
    places = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(BATCH, SEQUENCE, 4)
    return {**_text(model), "bbox": places, "pixel_values": _image(model)}


def _short_text_and_image(model):
    ids = token_ids(BATCH, 16, VOCABULARY // 2, "cpu")
    return {"input_ids": ids, "pixel_values": _image(model)}


def _series(model):
    """TimesFM: the model proper wants the mask of what is padding and how often values come, the head does not."""
    past = _values(model.config.context_length)
    if "past_values_padding" not in inspect.signature(model.forward).parameters:
        return {"past_values": list(past)}
    frequency = {"freq": torch.zeros(BATCH, 1, dtype=torch.long)} if "freq" in _takes(model) else {}
    return {"past_values": past, "past_values_padding": torch.zeros_like(past, dtype=torch.long), **frequency}


def _takes(model):
    return inspect.signature(model.forward).parameters


def _sound_and_decoder_text(model):
    return {"input_values": _values(SAMPLES), "decoder_input_ids": token_ids(BATCH, 8, 64, "cpu")}


def _question(model):
    return {**_text(model), "question_positions": torch.full((BATCH, 1), 3)}


def _in_a_language(model):
    return {**_text(model), "lang_ids": torch.zeros(BATCH, dtype=torch.long)}


def _codes_of_codebooks(model):
    """MusicGen: the codebooks of an example are rows of the batch."""
    books = getattr(model.config, "decoder", model.config).num_codebooks
    return {"input_ids": token_ids(BATCH * books, 8, 64, "cpu")}


def _columns_of_codes(model):
    return {
        "input_ids": token_ids(BATCH * SEQUENCE, model.config.num_codebooks + 1, 64, "cpu").view(BATCH, SEQUENCE, -1)
    }


def _task_and_image(model):
    return {"pixel_values": _values(3, 224, 224), "task_inputs": token_ids(BATCH, 77, 64, "cpu")}


def _array(model):
    return {"inputs": _values(SEQUENCE, model.config.d_model)}


def _queries(model):
    config = model.config
    seen = _values(16, config.encoder_hidden_size)
    return {"query_embeds": _values(8, config.hidden_size), "encoder_hidden_states": seen}


def _prompt_images(model):
    side = model.config.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    height //= 2 if height == 2 * width else 1
    image = _values(3, height, width)
    return {"pixel_values": image, "prompt_pixel_values": image, "prompt_masks": image}


def _long_sound(model):
    features = _values(1, 1001, model.config.audio_config.num_mel_bins)
    return {**_text(model), "input_features": features, "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}


def _spoken_text(model):
    return {**_text(model), "input_features": _values(model.config.decoder_config.feature_size, 64)}


def _placed_patches(model):
    config = model.config
    places = torch.stack([torch.arange(36) % 6, torch.arange(36) // 6], dim=1).expand(BATCH, 36, 2)
    return {"pixel_values": _values(36, 3 * config.patch_size**2), "pixel_position_ids": places}


def _speech(model):
    mel = _values(16, model.config.num_mel_bins)
    return {
        "input_values": token_ids(BATCH, 16, 64, "cpu") if "Text" in type(model).__name__ else mel,
        "decoder_input_values": mel,
    }


def _line_of_text(model):
    return {"pixel_values": _values(3, 48, 320)}


def _values(*shape: int) -> torch.Tensor:
    return _waves(BATCH, *shape)


def _waves(*shape: int) -> torch.Tensor:
    return waves(shape, torch.float32, "cpu")


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


def _characters_and_codes(model):
    return {**_decoder_codes(model), **_characters(model)}


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
    "blip_2_qformer": _queries,
    "bros": _float_boxes,
    "canine": _characters,
    "clap": _long_sound,
    "clvp": _spoken_text,
    "dac": _waveform,
    "decision_transformer": _trajectory,
    "dia": _characters_and_codes,
    "efficientloftr": _image_pairs,
    "encodec": _waveform,
    "gemma4_vision": _placed_patches,
    "idefics": _interleaved_images,
    "informer": _time_series,
    "instructblip": _queried_image,
    "instructblipvideo": _queried_image,
    "kosmos-2": _embedded_image,
    "kyutai_speech_to_text": _columns_of_codes,
    "layoutlm": _boxes,
    "layoutlmv3": _boxes,
    "lightglue": _image_pairs,
    "lilt": _boxes,
    "lxmert": _regions,
    "mimi": _waveform,
    "musicgen": _codes_of_codebooks,
    "musicgen_melody": _codes_of_codebooks,
    "oneformer": _task_and_image,
    "owlv2": _short_text_and_image,
    "owlvit": _short_text_and_image,
    "patchtsmixer": _channels_over_time,
    "patchtst": _channels_over_time,
    "perceiver": _array,
    "pix2struct": _patches,
    "pp_ocrv5_mobile_rec": _line_of_text,
    "pp_ocrv5_server_rec": _line_of_text,
    "pp_ocrv6_small_rec": _line_of_text,
    "pp_ocrv6_tiny_rec": _line_of_text,
    "sam": _prompted_image,
    "seggpt": _prompt_images,
    "speech-encoder-decoder": _sound_and_decoder_text,
    "speecht5": _speech,
    "splinter": _question,
    "superglue": _image_pairs,
    "time_series_transformer": _time_series,
    "timesfm": _series,
    "timesfm2_5": _series,
    "timesformer": _frames,
    "udop": _document,
    "videomae": _frames,
    "vivit": _frames,
    "xmod": _in_a_language,
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
