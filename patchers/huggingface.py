"""Hugging Face transformers: any model that reads token ids, pixels or audio, from its configuration.

What a model reads is taken from its `main_input_name`, its forward signature and its configuration,
never from a list of classes. The configurations of well-known models come with the package, one JSON file
each in `configs/`: only the fields that define the architecture.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .by_name import unknown_name
from .configurations import directory_config, hub_config
from .labels import CHOICES, is_multiple_choice, loss_arguments, without_what_labels_tell
from .library import Library
from .made_up_inputs import input_dtype, token_ids, waves
from .meta import built_on_meta
from .request_errors import InputSizeError, ModelNameError

DEFAULT_TOKENS = 512
DEFAULT_AUDIO_SAMPLES = 160_000  # ten seconds at 16 kHz, the length of a usual training clip


def names() -> list[str]:
    """The models whose configuration comes with invact: hub names, and their last parts by themselves."""
    return sorted({known for full in _bundled() for known in (full, full.rpartition("/")[2])})


def reads(directory: Path) -> bool:
    """Whether the directory holds the config.json of a transformers model."""
    return "model_type" in directory_config(directory, "config.json")


def load(name: str, dtype: torch.dtype, image_size: int | None = None) -> nn.Module:
    """Build the class that the configuration names (`architectures`), as `from_pretrained` would."""
    config = _config(name)
    if image_size is not None:
        _vision_config(config).image_size = image_size
    return built_on_meta(lambda: _built(config), dtype)


def config_fields(name: str) -> dict[str, Any]:
    """What a model's config.json says: of a directory, of the package, or of the hub.

    Raises:
        ModelNameError: there is none to be had.
    """
    if reads(Path(name)):
        return directory_config(name, "config.json")
    bundled = _bundled()
    by_last_part = {known.rpartition("/")[2]: known for known in bundled}
    known = by_last_part.get(name, name)
    if known in bundled:
        return directory_config(bundled[known].parent, bundled[known].name)
    try:
        return hub_config(name, "config.json")
    except LookupError as why:
        otherwise = "pass a directory with the model's config.json."
        raise unknown_name("transformers", name, str(why), otherwise) from None


def example_inputs(
    model: Any,
    batch_size: int,
    seq_len: int | None = None,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    loss: bool = True,
) -> dict[str, Any]:
    """What the model's forward needs, by keyword: no attention mask, so attention stays fused; and what its loss does.

    See `labels`.
    """
    wanted = _wanted_inputs(model)
    _check_sizes(model, wanted, seq_len, image_size)
    inputs: dict[str, torch.Tensor] = {}
    for name in wanted:
        if name.endswith("input_ids"):
            inputs[name] = _token_ids(model, name, batch_size, seq_len, device)
        else:
            shape = (batch_size, *_sample_shape(model, name, seq_len, image_size))
            inputs[name] = waves(shape, input_dtype(model), device)
    if is_multiple_choice(model):
        inputs = {name: torch.stack([tensor] * CHOICES, dim=1) for name, tensor in inputs.items()}
    return without_what_labels_tell(model, {**inputs, **loss_arguments(model, inputs)}) if loss else inputs


def _wanted_inputs(model: Any) -> list[str]:
    parameters = inspect.signature(model.forward).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    wanted = {model.main_input_name, *required}
    if {"input_ids", "pixel_values"} <= parameters.keys():  # CLIP and its kin: one tower each
        wanted |= {"input_ids", "pixel_values"}
    if "decoder_input_ids" in parameters and model.config.is_encoder_decoder:
        wanted.add("decoder_input_ids")
    unknown = wanted - {"input_ids", "decoder_input_ids", "pixel_values", "input_features", "input_values"}
    mixes = {"image_token_id", "image_token_index"} & set(vars(model.config)) and "pixel_values" in wanted
    if unknown or mixes:
        reason = "its text must hold image tokens" if mixes else f"it needs {', '.join(sorted(unknown))}"
        raise InputSizeError(
            f"Cannot make example inputs for {type(model).__name__}: {reason}. "
            f"Pass example_inputs: a dict of what you train it with."
        )
    return [model.main_input_name, *sorted(wanted - {model.main_input_name})]


def _check_sizes(model: Any, wanted: list[str], seq_len: int | None, image_size: int | None) -> None:
    name = type(model).__name__
    reads_text = any(w.endswith("input_ids") for w in wanted)
    if seq_len is not None and not reads_text and "input_values" not in wanted:
        raise InputSizeError(f"{name} reads images and has no sequence length. Give an image size instead.")
    if image_size is not None and "pixel_values" not in wanted:
        raise InputSizeError(f"{name} reads no images and has no image size. Give a sequence length instead.")
    longest = _longest_text(model) if reads_text else None
    if seq_len is not None and longest is not None and seq_len > longest:
        raise InputSizeError(
            f"{name} takes at most {longest} tokens, not {seq_len}, because it has no more positions. "
            f"Give a sequence length of {longest} or less."
        )


def _token_ids(model: Any, name: str, batch_size: int, seq_len: int | None, device: torch.device | str) -> torch.Tensor:
    config = _text_config(model.config)
    length = seq_len or min(DEFAULT_TOKENS, _longest_text(model) or DEFAULT_TOKENS)
    ids = token_ids(batch_size, length, config.vocab_size, device)
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < config.vocab_size:
        ids[:, -1] = end  # heads that pool one token look for the end of the text
    return ids


def _longest_text(model: Any) -> int | None:
    config = _text_config(model.config)
    limits = [getattr(config, name, None) for name in ("max_target_positions", "max_position_embeddings")]
    positions = next((n for n in limits if n is not None and n > 0), None)
    return None if positions is None else positions - _padding_positions(model)


def _padding_positions(model: nn.Module) -> int:
    """RoBERTa and its kin count positions from behind the padding index: 514 rows hold 512 tokens."""
    tables = (
        layer
        for name, layer in model.named_modules()
        if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding)
    )
    return max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)


def _sample_shape(model: Any, name: str, seq_len: int | None, image_size: int | None) -> tuple[int, ...]:
    config = model.config
    if name == "pixel_values":
        return _image_shape(_vision_config(config), image_size)
    mel_bins = getattr(config, "num_mel_bins", None)
    if name == "input_features" and mel_bins and hasattr(config, "max_source_positions"):
        return (mel_bins, 2 * config.max_source_positions)  # Whisper halves the frames in its second convolution
    if name == "input_values" and mel_bins:
        return (config.max_length, mel_bins)  # a spectrogram
    if name == "input_values":
        return (seq_len or DEFAULT_AUDIO_SAMPLES,)
    raise InputSizeError(
        f"Cannot make example inputs for {type(model).__name__}: its configuration does not say what shape "
        f"{name} has. Pass example_inputs: a dict of what you train it with."
    )


def _image_shape(config: Any, image_size: int | None) -> tuple[int, ...]:
    size = image_size or getattr(config, "image_size", 224)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    frames = getattr(config, "num_frames", None)
    image = (getattr(config, "num_channels", 3), height, width)
    return image if frames is None else (frames, *image)


def _text_config(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config


def _built(config: Any) -> nn.Module:
    import transformers

    for architecture in config.architectures or ():
        if model_class := getattr(transformers, architecture, None):
            model: nn.Module = model_class(config)
            return model
    headless: nn.Module = transformers.AutoModel.from_config(config)
    return headless


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    fields = config_fields(name)
    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ModelNameError(
            f"{name} cannot be built: its model_type {model_type!r} is not in this version of transformers. "
            f"Upgrade transformers, or build the model yourself and pass it to invact.plan."
        )
    return CONFIG_MAPPING[model_type].from_dict(fields)


@cache
def _bundled() -> dict[str, Path]:
    directory = Path(__file__).parent / "configs"
    return {path.stem.replace("--", "/"): path for path in directory.glob("*.json")}


@contextmanager
def masks_dropped_as_if_real(inputs: Any) -> Iterator[None]:
    """Lets transformers drop a fake attention mask that masks nothing, as it drops a real one.

    It asks the mask for its values, and the positions whether several texts are packed into one, which it does not do
    with fake ones; the layers would then keep a mask that they do not keep in training, and a GPU would not use
    flash attention.
    """
    masking = sys.modules.get("transformers.masking_utils")
    given = inputs if isinstance(inputs, dict) else {}
    pads = any(
        isinstance(mask, torch.Tensor) and not _masks_nothing(mask) for name, mask in given.items() if "mask" in name
    )
    names = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa", "find_packed_sequence_indices")
    stock = {name: getattr(masking, name) for name in names if hasattr(masking, name)}
    find_packed = stock.pop("find_packed_sequence_indices", None)
    packs = find_packed is not None and _packs(given.get("position_ids"), find_packed)

    def without_mask(decide: Callable[..., bool]) -> Callable[..., bool]:
        def ignores(padding_mask: Any, *args: Any, **kwargs: Any) -> bool:
            fake = isinstance(padding_mask, FakeTensor)
            return decide(None if fake and not pads else padding_mask, *args, **kwargs)

        return ignores

    def find_packed_as_if_real(position_ids: Any) -> Any:
        return None if isinstance(position_ids, FakeTensor) and not packs else find_packed(position_ids)

    replaced = {name: without_mask(decide) for name, decide in stock.items()}
    if find_packed is not None:
        stock["find_packed_sequence_indices"] = find_packed
        replaced["find_packed_sequence_indices"] = find_packed_as_if_real
    for name, replacement in replaced.items():
        setattr(masking, name, replacement)
    try:
        yield
    finally:
        for name, original in stock.items():
            if getattr(masking, name) is replaced[name]:  # else somebody has set another since
                setattr(masking, name, original)


def _packs(position_ids: Any, find_packed: Callable[..., Any]) -> bool:
    """Whether these positions begin anew in the middle; not where the values are not to be had."""
    if not isinstance(position_ids, torch.Tensor) or position_ids.is_meta or isinstance(position_ids, FakeTensor):
        return False
    return position_ids.dim() == 2 and find_packed(position_ids) is not None


def _masks_nothing(mask: torch.Tensor) -> bool:
    """Whether every position may be attended to; taken for granted where the values are not to be had."""
    if mask.is_meta or isinstance(mask, FakeTensor):
        return True
    return bool(mask.all())


def checkpoint(model: Any) -> bool:
    """By the name that transformers 5 gives the method, or else 4."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": False})
            return True
    return False


LIBRARY = Library(
    name="transformers",
    package="transformers",
    marks=("config", "main_input_name"),
    load=load,
    example_inputs=example_inputs,
    names=names,
    reads=reads,
    as_on_real_tensors=masks_dropped_as_if_real,
    checkpoint=checkpoint,
)
