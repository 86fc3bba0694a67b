"""The models that are trained here, by short names: real classes with random weights, made on the device itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from invact.bench.steps import training_inputs
from invact.patchers import huggingface

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

_NARROW = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
_TINY = _NARROW | {"num_hidden_layers": 3}
_TINY_TEXT = _TINY | {"vocab_size": 256}
_TINY_LLAMA = _TINY_TEXT | {"num_key_value_heads": 2}
_TINY_GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 256}
_TINY_CLIP = {
    "text_config": _TINY_TEXT | {"hidden_act": "quick_gelu", "max_position_embeddings": 16},
    "vision_config": _TINY | {"hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8},
}
_TINY_OPEN_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 256, "width": 64, "heads": 4, "layers": 3},
}
_SMALL_TEXT = {"vocab_size": 256, "hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Of a model on its own, without what `Llama-3.1-8B` has for long texts.
_LLAMA = {"rope_scaling": None, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 2048}


@dataclass(frozen=True)
class Spec:
    """A model and the batch that it is measured with.

    Attributes:
        name: a configuration of invact.patchers, or "timm/..." or "open_clip/...".
        batch, tokens: of a step.
        fields: of the configuration, in place of those it comes with.
        tiny: the same for a run that only shows that everything runs; for timm another model's name.
        lora: whether the weights are frozen and adapters trained instead.
        headless: whether it ends with its last layer, so that it has no loss of its own.
    """

    name: str
    batch: int
    tokens: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | str = ""
    lora: bool = False
    headless: bool = False


# Of 15 to 35 GiB at stock's peak: they fill a good part of a card of 80 GiB, beside a copy of the model for each way.
SPECS = {
    "bert": Spec("bert-base-uncased", 128, 512, tiny=_TINY_TEXT),
    "mistral": Spec("Mistral-7B-v0.1", 32, 512, {"num_hidden_layers": 4}, _TINY_LLAMA),
    "gpt2": Spec("gpt2", 32, 1024, tiny=_TINY_GPT2),
    "vit": Spec("timm/vit_base_patch16_224", 512, tiny="timm/test_vit"),
    "clip": Spec("clip-vit-base-patch32", 768, tiny=_TINY_CLIP),
    "openclip": Spec("open_clip/ViT-B-32", 768, tiny=_TINY_OPEN_CLIP),
    "lora": Spec("Mistral-7B-v0.1", 16, 512, {"num_hidden_layers": 4}, _TINY_LLAMA, lora=True),
    "convnext": Spec("timm/convnext_base", 192, tiny="timm/test_convnext"),
    # Of a size for a CPU.
    "bert-cpu": Spec("bert-base-uncased", 8, 128, _NO_DROPOUT, _TINY_TEXT, headless=True),
    "llama-cpu": Spec(
        "Llama-3.1-8B",
        4,
        256,
        {
            **_LLAMA,
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 4,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
        _TINY_LLAMA,
        headless=True,
    ),
    # So narrow that a step is nothing but Python and dispatch.
    "bert-narrow": Spec("bert-base-uncased", 1, 8, _NARROW | {"vocab_size": 256}, _TINY_TEXT, headless=True),
}

EXACT_SPECS = {
    "bert": Spec("bert-base-uncased", 2, 64, _SMALL_TEXT | {"intermediate_size": 512}, {"num_hidden_layers": 1}),
    "llama": Spec(
        "Llama-3.1-8B",
        2,
        64,
        {**_LLAMA, **_SMALL_TEXT, "intermediate_size": 352, "num_key_value_heads": 2},
        {"num_hidden_layers": 1},
    ),
    "gpt2": Spec(
        "gpt2",
        2,
        64,
        {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0},
        {"n_layer": 1},
    ),
    # No dropout: under autocast on a GPU stock's GELU, written out with a power, gives fp32 where ours gives 16 bits,
    # and what drops out after it would draw another mask.
    "t5 gated": Spec(
        "t5-small",
        2,
        64,
        {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        | {"vocab_size": 256, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0},
        {"num_layers": 1, "num_decoder_layers": 1},
    ),
}
"""Small ones, whose gradients are compared bit for bit; with the dropout that they come with, where nothing is said."""


def model_and_inputs(
    spec: Spec, tiny: bool, tokens: int | None = None, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Callable[[int], Any]]:
    """A model in training mode, in bf16 (fp32 on a CPU) if not in `dtype`, and what makes inputs of a batch size."""
    dtype = dtype or (torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    model = _made(lambda: _built(spec, tiny), dtype).train()
    tokens = tokens or spec.tokens
    if tiny and tokens is not None:
        tokens = min(tokens, 16)
    # Made by the model itself: an adapter around it hides which library it is of.
    plain = model

    def inputs_of(size: int) -> Any:
        return training_inputs(plain, size, tokens, None, DEVICE)

    return (_with_adapters(model) if spec.lora else model), inputs_of


def batch_of(spec: Spec, tiny: bool) -> int:
    return min(2, spec.batch) if tiny else spec.batch


def _made(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return build().to(DEVICE, dtype)
    finally:
        torch.set_default_dtype(before)


def _built(spec: Spec, tiny: bool) -> nn.Module:
    library, _, name = spec.name.rpartition("/")
    if library == "timm":
        return _timm(str(spec.tiny).removeprefix("timm/") if tiny else name)
    if library == "open_clip":
        return _open_clip(name, spec.tiny if tiny and isinstance(spec.tiny, dict) else None)
    return _transformers(spec, tiny)


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


def _open_clip(name: str, config: dict[str, Any] | None) -> nn.Module:
    import open_clip

    config = config or open_clip.get_model_config(name)
    model: nn.Module = open_clip.CLIP(**{key: value for key, value in config.items() if key != "custom_text"})
    return model


def _transformers(spec: Spec, tiny: bool) -> nn.Module:
    import transformers

    fields = huggingface.config_fields(spec.name) | spec.fields | {"use_cache": False}
    for name, value in (spec.tiny if tiny and isinstance(spec.tiny, dict) else {}).items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    if spec.headless:
        bare: nn.Module = transformers.AutoModel.from_config(config)
        if hasattr(bare, "pooler"):
            bare.pooler = None  # it would keep the last layer's output
        return bare
    model: nn.Module = getattr(transformers, config.architectures[0])(config)
    return model


def _with_adapters(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config).to(DEVICE).train()
    return adapted
