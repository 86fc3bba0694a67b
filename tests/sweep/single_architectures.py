"""Inputs that single architectures of transformers ask for."""

from __future__ import annotations

import inspect

import torch
from made_up_inputs import BATCH, SAMPLES, SEQUENCE, VOCABULARY, decoder_text, image_for, text_for, values

from invact.patchers.made_up_inputs import token_ids


def _patches(model):
    """Pix2Struct: each patch with its row and column before it."""
    patches = values(16, model.config.vision_config.patch_embed_hidden_size)
    places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], dim=1).expand(BATCH, 16, 2)
    inputs = {"flattened_patches": torch.cat([places, patches], dim=2)}
    return {**decoder_text(model), **inputs}


def _document(model):
    places = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(BATCH, SEQUENCE, 4)
    return {**text_for(model), "bbox": places, "pixel_values": image_for(model)}


def _short_text_and_image(model):
    ids = token_ids(BATCH, 16, VOCABULARY // 2, "cpu")
    return {"input_ids": ids, "pixel_values": image_for(model)}


def _series(model):
    """TimesFM: the model proper wants the mask of what is padding and how often values come, the head does not."""
    past = values(model.config.context_length)
    if "past_values_padding" not in inspect.signature(model.forward).parameters:
        return {"past_values": list(past)}
    frequency = {"freq": torch.zeros(BATCH, 1, dtype=torch.long)} if "freq" in _takes(model) else {}
    return {"past_values": past, "past_values_padding": torch.zeros_like(past, dtype=torch.long), **frequency}


def _takes(model):
    return inspect.signature(model.forward).parameters


def _sound_and_decoder_text(model):
    return {"input_values": values(SAMPLES), "decoder_input_ids": token_ids(BATCH, 8, 64, "cpu")}


def _question(model):
    return {**text_for(model), "question_positions": torch.full((BATCH, 1), 3)}


def _in_a_language(model):
    return {**text_for(model), "lang_ids": torch.zeros(BATCH, dtype=torch.long)}


def _codes_of_codebooks(model):
    """MusicGen: the codebooks of an example are rows of the batch."""
    books = getattr(model.config, "decoder", model.config).num_codebooks
    return {"input_ids": token_ids(BATCH * books, 8, 64, "cpu")}


def _columns_of_codes(model):
    return {
        "input_ids": token_ids(BATCH * SEQUENCE, model.config.num_codebooks + 1, 64, "cpu").view(BATCH, SEQUENCE, -1)
    }


def _task_and_image(model):
    return {"pixel_values": values(3, 224, 224), "task_inputs": token_ids(BATCH, 77, 64, "cpu")}


def _array(model):
    return {"inputs": values(SEQUENCE, model.config.d_model)}


def _queries(model):
    config = model.config
    seen = values(16, config.encoder_hidden_size)
    return {"query_embeds": values(8, config.hidden_size), "encoder_hidden_states": seen}


def _prompt_images(model):
    side = model.config.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    height //= 2 if height == 2 * width else 1
    image = values(3, height, width)
    return {"pixel_values": image, "prompt_pixel_values": image, "prompt_masks": image}


def _long_sound(model):
    features = values(1, 1001, model.config.audio_config.num_mel_bins)
    return {**text_for(model), "input_features": features, "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}


def _spoken_text(model):
    return {**text_for(model), "input_features": values(model.config.decoder_config.feature_size, 64)}


def _placed_patches(model):
    config = model.config
    places = torch.stack([torch.arange(36) % 6, torch.arange(36) // 6], dim=1).expand(BATCH, 36, 2)
    return {"pixel_values": values(36, 3 * config.patch_size**2), "pixel_position_ids": places}


def _speech(model):
    mel = values(16, model.config.num_mel_bins)
    return {
        "input_values": token_ids(BATCH, 16, 64, "cpu") if "Text" in type(model).__name__ else mel,
        "decoder_input_values": mel,
    }


def _line_of_text(model):
    return {"pixel_values": values(3, 48, 320)}


def _boxes(model):
    boxes = torch.tensor([10, 20, 30, 40]).expand(BATCH, SEQUENCE, 4)
    return {**text_for(model), "bbox": boxes}


def _float_boxes(model):
    return {**text_for(model), "bbox": values(SEQUENCE, 8)}


def _characters(model):
    return {"input_ids": 97 + torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % 26}


def _queried_image(model):
    """BLIP-2 and its kin: as many image tokens as queries, and a question for the Q-Former."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    frames = (4,) if "video" in type(model).__name__.lower() else ()
    token = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", token) if frames else token
    text = text_for(model)
    count = config.num_query_tokens * (frames[0] if frames else 1)
    ids = torch.cat([torch.full((BATCH, count), token), text["input_ids"]], dim=1)
    inputs = {**text, "input_ids": ids, "pixel_values": image_for(model, frames=frames)}
    if "qformer_input_ids" in inspect.signature(model.forward).parameters:
        inputs["qformer_input_ids"] = token_ids(BATCH, 8, config.qformer_config.vocab_size, "cpu")
    return inputs


def _interleaved_images(model):
    side = model.config.vision_config.image_size
    seen = torch.ones(BATCH, SEQUENCE, 1, dtype=torch.long)
    return {**text_for(model), "pixel_values": values(1, 3, side, side), "image_attention_mask": seen}


def _embedded_image(model):
    """Kosmos-2: the first tokens give way to the image."""
    mask = torch.zeros(BATCH, SEQUENCE + model.config.latent_query_num, dtype=torch.long)
    mask[:, 1 : 1 + model.config.latent_query_num] = 1
    ids = token_ids(BATCH, mask.shape[1], VOCABULARY // 2, "cpu")
    return {"input_ids": ids, "pixel_values": image_for(model), "image_embeds_position_mask": mask}


def _regions(model):
    return {**text_for(model), "visual_feats": values(6, model.config.visual_feat_dim), "visual_pos": values(6, 4)}


def _image_pairs(model):
    channels = 1 if "LoFTR" in type(model).__name__ else 3
    return {"pixel_values": values(2, channels, 96, 96)}


def _decoder_codes(model):
    codes = token_ids(BATCH * 8, model.config.decoder_config.num_channels, 64, "cpu")
    return {**text_for(model), "decoder_input_ids": codes.view(BATCH, 8, -1)}


def _characters_and_codes(model):
    return {**_decoder_codes(model), **_characters(model)}


def _trajectory(model):
    config = model.config
    return {
        "states": values(8, config.state_dim),
        "actions": values(8, config.act_dim),
        "rewards": values(8, 1),
        "returns_to_go": values(8, 1),
        "timesteps": torch.arange(8).expand(BATCH, 8),
        "attention_mask": torch.ones(BATCH, 8),
    }


def _time_series(model):
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    features = config.num_time_features
    return {
        "past_values": values(past),
        "past_time_features": values(past, features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": values(config.prediction_length),
        "future_time_features": values(config.prediction_length, features),
    }


def _channels_over_time(model):
    config = model.config
    return {"past_values": values(config.context_length, config.num_input_channels)}


def _waveform(model):
    """Codecs take sound with a channel."""
    return {"input_values": values(1, SAMPLES)}


def _prompted_image(model):
    points = torch.tensor([10.0, 20.0]).expand(BATCH, 1, 1, 2)
    return {"pixel_values": image_for(model), "input_points": points}


def _frames(model):
    return {"pixel_values": image_for(model, frames=(getattr(model.config, "num_frames", 4),))}


SPECIAL = {
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
