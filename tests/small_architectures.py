"""Architectures of transformers in the smallest configuration that has every part."""

from __future__ import annotations

import torch
import transformers

from invact import patchers

TRANSFORMER = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {**TRANSFORMER, "max_position_embeddings": 20}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32} | {
    "image_size": 16,
    "patch_size": 8,
}
SEQUENCES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 100} | {
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def small(architecture: str, **fields: object) -> torch.nn.Module:
    model_class = getattr(transformers, architecture)
    return model_class(model_class.config_class(**fields))


SMALL_MODELS = {
    "BertForMaskedLM": TEXT,
    "RobertaForMaskedLM": TEXT,
    "DistilBertForMaskedLM": {"vocab_size": 100, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32},
    "GPT2LMHeadModel": {"vocab_size": 100, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20},
    "MistralForCausalLM": {**TEXT, "num_key_value_heads": 1},
    "T5ForConditionalGeneration": {"vocab_size": 100, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1},
    "T5EncoderModel": {"vocab_size": 100, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1},
    "BartForConditionalGeneration": {**SEQUENCES, "max_position_embeddings": 20},
    "BartForSequenceClassification": {**SEQUENCES, "max_position_embeddings": 20},
    "ViTForImageClassification": IMAGE,
    "ViTMAEForPreTraining": IMAGE,
    "Dinov2Model": IMAGE,
    "ConvNextForImageClassification": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]},
    "CLIPModel": {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
    "CLIPTextModel": TEXT,
    "CLIPVisionModelWithProjection": IMAGE,
    "SiglipModel": {"text_config": TEXT, "vision_config": IMAGE},
    "WhisperForConditionalGeneration": SEQUENCES
    | {"max_source_positions": 50, "max_target_positions": 20, "pad_token_id": 0},
    "Wav2Vec2ForCTC": TRANSFORMER
    | {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [50, 4], "num_feat_extract_layers": 2}
    | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2},
    "ASTForAudioClassification": IMAGE | {"max_length": 64, "num_mel_bins": 32, "patch_size": 16},
    "VideoMAEForVideoClassification": IMAGE | {"num_frames": 4},
}


def shapes(inputs: patchers.ExampleInputs) -> list[torch.Size]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return [value.shape for value in values if isinstance(value, torch.Tensor)]
