"""OpenCLIP: one model of every kind of configuration, with two layers to a tower and narrow ones."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

# timm towers have no common way to be made shallow: the smallest of the family stands for it.
_SMALLEST = {
    "convnext": "convnext_atto",
    "eva": "eva02_tiny_patch14_224",
    "eva02": "eva02_tiny_patch14_224",
    "fastvit": "fastvit_mci0",
    "vit siglip": "vit_base_patch16_siglip_224",
    "vit pe core": "vit_pe_core_tiny_patch16_384",
    "vitamin": "vitamin_small_224",
}
_SIZES = re.compile(
    r"_?(tiny|small|medium|base|large2?|x+large|giant|giantopt|gigantic|so400m|enormous|patch\d+|\d+)(?=_|$)"
)
_LANGUAGE_MODELS = {"roberta": "roberta", "xlm-roberta": "xlm-roberta", "mt5": "mt5", "nllb": "m2m_100"}


def names() -> list[str]:
    """The first model of every kind: same fields, same choices, whatever the sizes."""
    import open_clip

    kinds: dict[str, str] = {}
    for name in open_clip.list_models():
        kinds.setdefault(_kind(open_clip.get_model_config(name)), name)
    return sorted(kinds.values())


def _kind(config: dict) -> str:
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    for tower in (vision, text):
        for key, value in tower.items():
            if key == "timm_model_name":
                tower[key] = _family(value)
            elif key == "hf_model_name":
                tower[key] = _language_model(value)
            elif not isinstance(value, (str, bool)) or key.startswith("hf_tokenizer"):
                tower[key] = type(value).__name__
    return json.dumps([sorted(config), vision, text], sort_keys=True)


def _family(timm_name: str) -> str:
    family = _SIZES.sub("", timm_name).replace("_", " ")
    return family if family.startswith("vit ") else family.partition(" ")[0]


def _language_model(hub_name: str) -> str:
    last = hub_name.rpartition("/")[2]
    return next(kind for start, kind in _LANGUAGE_MODELS.items() if last.startswith(start))


def attempts(name: str) -> Iterator:
    """(what builds the model, what makes its inputs): shrunk, then as it is."""
    from invact import patchers

    for shrink in (True, False):
        yield partial(_built, name, shrink), [partial(patchers.example_inputs, batch_size=2)]


def _built(name: str, shrink: bool):
    import open_clip

    config = open_clip.get_model_config(name)
    if shrink:
        shorten(config)
    with TemporaryDirectory() as directory:
        _name_language_model(config, directory)
        Path(directory, "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return open_clip.create_model(f"local-dir:{directory}", load_weights=False, pretrained_text=False)


def shorten(config: dict) -> None:
    """Two layers to a tower, few words, images of few patches, the smallest timm tower of its kind."""
    for key in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        tower = config.get(key, {})
        layers = tower.get("layers")
        if isinstance(layers, int):
            tower["layers"] = min(2, layers)
        elif isinstance(layers, list):
            tower["layers"] = [1] * len(layers)
        if "vocab_size" in tower and "hf_tokenizer_name" in tower:
            tower["vocab_size"] = 1024
    vision = config["vision_cfg"]
    patch = vision.get("patch_size")
    if patch and "timm_model_name" not in vision:
        vision["image_size"] = 4 * patch
    if "timm_model_name" in vision:
        _take_smallest(vision)


def _take_smallest(vision: dict) -> None:
    """The smallest timm tower of the family, with images of the one size that it may insist on."""
    import timm

    smallest = _SMALLEST.get(_family(vision["timm_model_name"]))
    if smallest is not None:
        vision["timm_model_name"] = smallest
        vision["image_size"] = timm.get_pretrained_cfg(smallest).input_size[-1]


def _name_language_model(config: dict, directory: str) -> None:
    """Lets OpenCLIP read the text tower's configuration from here instead of from the hub."""
    text = config["text_cfg"]
    if "hf_model_name" not in text:
        return
    from transformers import CONFIG_MAPPING
    from transformers_models import shorten as shorten_language_model

    language_model = CONFIG_MAPPING[_language_model(text["hf_model_name"])]()
    shorten_language_model(language_model)
    language_model.save_pretrained(directory)
    text["hf_model_name"] = directory
