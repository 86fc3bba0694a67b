"""Models of transformers that are built in no time: of the usual sizes, but for the fields that a test names."""

from __future__ import annotations

import transformers
from torch import nn

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 100}
USUAL = {
    "bert": TEXT,
    "gemma": {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "use_cache": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100},
    "llama": {**TEXT, "num_key_value_heads": 2, "use_cache": False},
    "mistral": {**TEXT, "num_key_value_heads": 2},
    "modernbert": {**TEXT, "pad_token_id": 0},
    "t5": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    | {"decoder_start_token_id": 0},
    "vit": {**SIZES, "image_size": 32, "patch_size": 8},
}
"""By the type of the configuration."""


def small_model(architecture: str, **fields: object) -> nn.Module:
    """A model of that class with random weights, in evaluation mode no more than any that is just built."""
    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    return model_class(config_class(**{**USUAL[config_class.model_type], **fields}))
