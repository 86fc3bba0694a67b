"""The models that are trained here, by short names: real sizes with random weights, made on the device itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from invact.patchers import huggingface
from torch import nn

from invact.bench_steps import training_inputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_SMALL = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
_SMALL_TEXT = _SMALL | {"vocab_size": 256}
_SMALL_MISTRAL = _SMALL_TEXT | {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Spec:
    """A model and the batch that it is measured with.

    Attributes:
        name: a configuration of invact.patchers, or "timm/..." .
        fields: of the configuration, in place of those it comes with.
        tiny: the same for a run that only shows that everything runs; for timm another model's name.
        batch, tokens: of a step.
        lora: whether the weights are frozen and adapters trained instead.
    """

    name: str
    batch: int
    tokens: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | str = ""
    lora: bool = False


SPECS = {
    "bert": Spec("bert-base-uncased", 32, 512, tiny=_SMALL_TEXT),
    "mistral": Spec("Mistral-7B-v0.1", 8, 512, {"num_hidden_layers": 4}, _SMALL_MISTRAL),
    "gpt2": Spec("gpt2", 16, 1024, tiny={"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 256}),
    "vit": Spec("timm/vit_base_patch16_224", 128, tiny="timm/test_vit"),
    "clip": Spec(
        "clip-vit-base-patch32",
        256,
        tiny={
            "text_config": _SMALL_TEXT | {"hidden_act": "quick_gelu", "max_position_embeddings": 16},
            "vision_config": _SMALL | {"hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8},
        },
    ),
    "lora": Spec("Mistral-7B-v0.1", 8, 512, {"num_hidden_layers": 4}, _SMALL_MISTRAL, lora=True),
    "convnext": Spec("timm/convnext_base", 64, tiny="timm/test_convnext"),
}


def model_and_inputs(
    short: str, tiny: bool, batch: int | None = None, tokens: int | None = None
) -> tuple[nn.Module, Callable[[int], Any]]:
    """A model in training mode, in bf16 (fp32 on a CPU), and what makes its inputs for a batch size."""
    spec = SPECS[short]
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model = _made(lambda: _timm(spec, tiny) if spec.name.startswith("timm/") else _transformers(spec, tiny), dtype)
    model.train()
    tokens = (tokens or spec.tokens) and (16 if tiny else tokens or spec.tokens)
    # Made by the model itself: an adapter around it hides which library it is of.
    plain = model

    def inputs_of(size: int) -> Any:
        return training_inputs(plain, size, tokens, None, DEVICE)

    return (_with_adapters(model) if spec.lora else model), inputs_of


def batch_of(short: str, tiny: bool) -> int:
    return 2 if tiny else SPECS[short].batch


def _made(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return build().to(DEVICE, dtype)
    finally:
        torch.set_default_dtype(before)


def _timm(spec: Spec, tiny: bool) -> nn.Module:
    import timm

    name = str(spec.tiny) if tiny else spec.name
    model: nn.Module = timm.create_model(name.removeprefix("timm/"))
    return model


def _transformers(spec: Spec, tiny: bool) -> nn.Module:
    import transformers

    fields = huggingface.config_fields(spec.name) | spec.fields | {"use_cache": False}
    for name, value in (spec.tiny if tiny and isinstance(spec.tiny, dict) else {}).items():
        fields[name] = fields[name] | value if isinstance(value, dict) else value
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    model: nn.Module = getattr(transformers, config.architectures[0])(config)
    return model


def _with_adapters(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    adapted: nn.Module = peft.get_peft_model(model, config).to(DEVICE).train()
    return adapted
