"""transformers: the base model and one head of every architecture in the Auto mappings, shrunk."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from inputs_for_transformers import input_makers
from limits import check_size
from made_up_inputs import SEQUENCE, VOCABULARY

# The first of these that an architecture has is its head.
_HEADS = (
    "CAUSAL_LM",
    "MASKED_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
)


def names() -> list[str]:
    """ "model_type/Class" for one head of every architecture, then for its base model."""
    from transformers.models.auto import modeling_auto

    mappings = {
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): getattr(modeling_auto, name)
        for name in dir(modeling_auto)
        if name.startswith("MODEL_") and name.endswith("MAPPING_NAMES")
    }
    base = mappings.pop("MODEL")
    mappings.pop("BACKBONE")
    heads = {**{key: mappings[key] for key in _HEADS}, **mappings}
    with_head = [
        f"{kind}/{_first(next(mapping[kind] for mapping in heads.values() if kind in mapping))}"
        for kind in sorted({kind for mapping in heads.values() for kind in mapping})
    ]
    bare = [f"{kind}/{_first(found)}" for kind, found in sorted(base.items())]
    return list(dict.fromkeys([*with_head, *bare]))


def _first(found: str | tuple[str, ...]) -> str:
    return found if isinstance(found, str) else found[0]


def attempts(name: str) -> Iterator:
    """(what builds the model, what may make its inputs): first narrow and shallow, then larger."""
    import transformers
    from transformers import CONFIG_MAPPING

    kind, _, class_name = name.partition("/")
    for shallow, factor in [(True, _fitting_factor(CONFIG_MAPPING[kind]())), (True, 4), (False, 8), (True, 1)]:

        def build(shallow=shallow, factor=factor):
            config = CONFIG_MAPPING[kind]()
            shorten(config, layers=shallow)
            if factor >= 8 and shallow:
                shrink_images(config)
            narrow(config, factor)
            complete(config, kind)
            model_class = getattr(transformers, class_name)
            config = _config_of(model_class, config)
            if factor < 8:  # too large a model is better noticed before it is made
                with torch.device("meta"):
                    check_size(model_class(config))
            if factor == 4:  # the grouped products want rows of 16 bytes
                config._experts_implementation = "eager"
            return model_class(config)

        yield build, input_makers(kind)


# --- the configuration --------------------------------------------------------------------------------

_WIDTH = re.compile(
    "hidden|dim|d_model|d_ff|d_kv|dff|d_head|d_inner|embd|embed|ffn|width|channels|_rank|intermediate|feedforward|"
    "classifier_proj|planes|filters|feature_size|proj|pooler|postnet_units|encoder_size|qk_size|v_size|output_size|d_latents|upsample_groups"
)
_NO_WIDTH = re.compile(
    "kernel|stride|patch|image|vocab|token|layers|_heads|^num_(?!filters|channels_)|max_|window|length|freq|ratio|(?<!upsample_)group|index|"
    "dropout|num_channels|_std|_type|position|stages|codebook_size|state_dim|act_dim|seq|rope_type|hop|dilat|scal"
)
_DEPTH = re.compile(
    "^(num_hidden_layers|n_layers?|num_layers|depth|num_blocks|.*(encoder|decoder|hidden|attention|transformer|predictor)_layers|"
    "num_decoder_blocks|.*_num_layers|.*_layers)$"
)
_OPEN = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "topk_group": 1,
    "n_group": 1,
    "pad_token_id": 0,
    "vocab_size": 64,
    "prediction_length": 8,
    "context_length": 16,
    "compress_ratio": 4,
    "token_budget": 16,
}
# Where a configuration class's own defaults do not fit each other.
_REPAIRS = {
    "blip-2": {"image_token_index": VOCABULARY - 1},
    "instructblip": {"image_token_index": VOCABULARY - 1},
    "instructblipvideo": {"video_token_index": VOCABULARY - 1},
    "aya_vision": {"vision_config.num_attention_heads": 8},
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "reformer": {"is_decoder": True, "axial_pos_shape": (4, 8)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
_EXPERTS = re.compile("^(n_routed_experts|num_experts|num_local_experts|moe_num_experts)$")


def _config_of(model_class, config):
    """The part of a composite configuration that the class reads, as the Auto classes find it."""
    if isinstance(config, model_class.config_class):
        return config
    return next((part for part in configs_in(config) if isinstance(part, model_class.config_class)), config)


def _fitting_factor(config) -> int:
    """16 for wide models, else 8; less where the heads of some part would no longer divide its width."""
    shapes = []
    for part in configs_in(config):
        fields = vars(part)
        width = fields.get("hidden_size", fields.get("d_model"))
        heads = fields.get("num_attention_heads", fields.get("encoder_attention_heads"))
        if isinstance(width, int) and isinstance(heads, int):
            shapes.append((width, heads))
    wide = max((width for width, _ in shapes), default=0) >= 2048
    factors = [16, 8, 4] if wide else [8, 4]
    return next((f for f in factors if all(width // f % heads == 0 for width, heads in shapes)), factors[0])


def configs_in(config) -> list:
    """A configuration and those inside it."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(found for value in inside for found in configs_in(value))]


def _set(config, path: str, value) -> None:
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)


def complete(config, kind: str) -> None:
    """Numbers that the configuration class leaves open, or that do not fit each other."""
    for part in configs_in(config):
        for key, value in list(vars(part).items()):
            if value is None and key in _OPEN:
                setattr(part, key, _OPEN[key])
            elif value is None and key == "head_dim":
                setattr(part, key, _head_width(part))
            elif value is None and key == "num_key_value_heads":
                setattr(part, key, vars(part).get("num_attention_heads"))
    for path, value in _REPAIRS.get(kind, {}).items():
        _set(config, path, value)


def shorten(config, layers: bool = True) -> None:
    """Few layers (or all), words and experts; special tokens keep apart."""
    moved: dict[int, int] = {}
    for part in configs_in(config):
        for key, value in list(vars(part).items()):
            if isinstance(value, bool) or key.startswith("_"):
                continue
            if isinstance(value, int):
                if key.endswith("vocab_size") and value > VOCABULARY:
                    setattr(part, key, VOCABULARY)
                elif key.endswith(("token_id", "token_index")) and value >= VOCABULARY // 2:
                    setattr(part, key, moved.setdefault(value, VOCABULARY - 1 - len(moved)))
                elif key.endswith("chunk_size") and value > SEQUENCE:  # of state space models, which pad to it
                    setattr(part, key, SEQUENCE)
                elif key == "num_kv_shared_layers":  # gemma3n: the last layers read the caches of earlier ones
                    setattr(part, key, 0)
                elif key in ("num_experts_per_tok", "top_k_experts", "moe_topk") and value > 4:
                    setattr(part, key, 4)
                elif _EXPERTS.match(key) and value > 8:
                    setattr(part, key, max(8, 2 * (getattr(part, "n_group", None) or 1)))
                elif layers and _DEPTH.match(key) and value > 2:
                    _set_depth(part, key, value)
            elif key.endswith("token_id") and isinstance(value, list):
                ids = [moved.setdefault(v, VOCABULARY - 1 - len(moved)) if v >= VOCABULARY // 2 else v for v in value]
                setattr(part, key, ids)
            elif layers and key == "depths" and isinstance(value, (list, tuple)):
                setattr(part, key, type(value)(min(depth, 2) for depth in value))


def _set_depth(config, key: str, depth: int) -> None:
    """Two layers, or so many that every kind of layer is there."""
    lists = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == depth and k != "depths"}
    kinds = [v for v in lists.values() if isinstance(v[0], str)]
    shallow = max([2, *(min(max(v.index(kind) for kind in set(v)) + 1, 8) for v in kinds)])
    if shallow >= depth:
        return
    setattr(config, key, shallow)
    for name, values in lists.items():
        setattr(config, name, values[:shallow])


def shrink_images(config) -> None:
    """Eight patches to a side, where patches are all that the size must fit."""
    for part in configs_in(config):
        side, patch = vars(part).get("image_size"), vars(part).get("patch_size")
        if isinstance(side, int) and isinstance(patch, int) and side > 8 * patch and not hasattr(part, "window_size"):
            part.image_size = 8 * patch


def narrow(config, factor: int) -> None:
    """Every width divided by the same factor, so that all that fitted together still does."""
    if factor == 1:
        return
    for part in configs_in(config):
        for key, value in list(vars(part).items()):
            if not _NO_WIDTH.search(key) and _WIDTH.search(key):
                setattr(part, key, _divided(value, factor))
        rope, head = vars(part).get("rope_parameters"), _head_width(part)
        if isinstance(rope, dict) and "rope_theta" in rope and head:
            half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]  # time, height, width


def _head_width(config) -> int | None:
    fields = vars(config)
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if isinstance(fields.get("head_dim"), int):
        return fields["head_dim"]
    return width // heads if isinstance(width, int) and isinstance(heads, int) else None


def _divided(value, factor: int):
    if isinstance(value, int) and not isinstance(value, bool) and value >= 32 and value % factor == 0:
        return value // factor
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return type(value)(_divided(item, factor) for item in value)
    return value
