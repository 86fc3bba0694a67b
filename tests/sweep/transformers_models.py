"""transformers: the base model and one head of every architecture in the Auto mappings, shrunk."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from inputs_for_transformers import SEQUENCE, input_makers
from limits import check_size

VOCABULARY = 1024

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
    """Builders of (model, inputs): first narrow and shallow, then larger, each with all inputs we know to make."""
    import transformers
    from transformers import CONFIG_MAPPING

    kind, _, class_name = name.partition("/")
    model_class = getattr(transformers, class_name)
    narrowest = 16 if _widest(CONFIG_MAPPING[kind]()) >= 2048 else 8
    for shallow, factor in [(True, narrowest), (True, 4), (False, 8), (True, 1)]:
        for number in range(len(input_makers)):

            def build(shallow=shallow, factor=factor, number=number):
                config = CONFIG_MAPPING[kind]()
                complete(config)
                for key, value in _REPAIRS.get(kind, {}).items():
                    _set(config, key, value)
                shorten(config, layers=shallow)
                if factor > 1:
                    narrow(config, factor)
                if factor < 8:  # too large a model is better noticed before it is made
                    with torch.device("meta"):
                        check_size(model_class(config))
                if factor == 4:  # the grouped products want rows of 16 bytes
                    config._experts_implementation = "eager"
                model = model_class(config)
                return model, input_makers[number](model)

            yield build


# --- the configuration --------------------------------------------------------------------------------

_WIDTH = re.compile(
    "hidden|dim|d_model|d_ff|d_kv|dff|d_head|d_inner|embd|embed|ffn|width|channels|_rank|intermediate|feedforward|"
    "classifier_proj|planes|filters|feature_size|proj|pooler|postnet_units|encoder_size|qk_size|v_size|output_size|d_latents"
)
_NO_WIDTH = re.compile(
    "kernel|stride|patch|image|vocab|token|layers|_heads|^num_(?!filters|channels_)|max_|window|length|freq|ratio|group|index|"
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
}
# Where a configuration class's own defaults do not fit each other.
_REPAIRS = {
    "aya_vision": {"vision_config.num_attention_heads": 16},
}
_EXPERTS = re.compile("^(n_routed_experts|num_experts|num_local_experts|moe_num_experts)$")


def _widest(config) -> int:
    widths = (getattr(part, name, 0) for part in configs_in(config) for name in ("hidden_size", "d_model"))
    return max(width for width in widths if isinstance(width, int))


def configs_in(config) -> list:
    """A configuration and those inside it."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *(found for value in inside for found in configs_in(value))]


def _set(config, path: str, value) -> None:
    *parts, name = path.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)


def complete(config) -> None:
    """Numbers that a configuration class leaves open."""
    for part in configs_in(config):
        for key, value in vars(part).items():
            if value is None and key in _OPEN:
                setattr(part, key, _OPEN[key])


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


def narrow(config, factor: int) -> None:
    """Every width divided by the same factor, so that all that fitted together still does."""
    for part in configs_in(config):
        for key, value in list(vars(part).items()):
            if not _NO_WIDTH.search(key) and _WIDTH.search(key):
                setattr(part, key, _divided(value, factor))
        rope = getattr(part, "rope_parameters", None)
        if isinstance(rope, dict) and all(hasattr(part, name) for name in ("hidden_size", "num_attention_heads")):
            head = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
            half = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
            rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]  # time, height, width


def _divided(value, factor: int):
    if isinstance(value, int) and not isinstance(value, bool) and value >= 32 and value % factor == 0:
        return value // factor
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, int) for item in value):
        return type(value)(_divided(item, factor) for item in value)
    return value
