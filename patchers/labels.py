"""What a Hugging Face model is given so that it computes its loss: labels of the right kind, in shape and type.

Which arguments ask for them, its forward's signature says; of what kind they are, the class of what that returns
(`TokenClassifierOutput`) together with the configuration, and never the model's own class.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor

from .made_up_inputs import input_dtype

CHOICES = 2
"""Answers of which a multiple-choice model is given one right one."""

_TRANSCRIBED = 8  # letters of a clip: what a CTC loss keeps depends on the frames, and hardly on these


def is_multiple_choice(model: Any) -> bool:
    """Whether its forward reads several texts for each sample."""
    return "MultipleChoice" in _output(model)


def loss_arguments(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments with which the model's forward gives its loss on these inputs; none where it has no loss.

    Of what needs more than classes and numbers, such as boxes in images, none are made.
    """
    parameters = inspect.signature(model.forward).parameters
    batch, device = len(next(iter(inputs.values()))), next(iter(inputs.values())).device
    one_each = torch.zeros(batch, dtype=torch.long, device=device)
    if "return_loss" in parameters:
        return {"return_loss": True}
    if {"start_positions", "end_positions"} <= parameters.keys():
        return {"start_positions": one_each, "end_positions": one_each.clone()}
    if "bool_masked_pos" in parameters and "MaskedImageModeling" in _output(model):
        return _masked_patches(model, batch, device)
    if "labels" not in parameters:
        return {}
    labels = _labels(model, inputs, one_each)
    if labels is None:
        return {}
    besides = [name for name in ("next_sentence_label", "sentence_order_label") if name in parameters]
    return {"labels": labels, **{name: one_each.clone() for name in besides}}


def without_what_labels_tell(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs less the decoder's, where the model makes these from the labels, as in training."""
    makes_them = hasattr(model, "prepare_decoder_input_ids_from_labels")
    starts = getattr(model.config, "decoder_start_token_id", None) is not None
    if "labels" in inputs and makes_them and starts:
        return {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    return inputs


def _labels(model: Any, inputs: dict[str, Tensor], one_each: Tensor) -> Tensor | None:
    output = _output(model)
    tokens = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if re.search(r"SequenceClassif|ImageClassif|PerceiverClassif|XVector", output):
        return _class_labels(model, one_each)
    if re.search(r"MultipleChoice|NextSentencePredictor", output):
        return one_each
    if re.search(r"SemanticSegmenter", output):
        pixels = inputs["pixel_values"]
        return torch.zeros(len(pixels), *pixels.shape[-2:], dtype=torch.long, device=pixels.device)
    if tokens is None:
        return _transcripts(model, one_each) if "CausalLM" in output else None
    if re.search(r"TokenClassifier|PreTraining", output):
        return torch.zeros_like(tokens)
    if re.search(r"CausalLM|LMOutput|DoubleHeads|ConditionalGeneration", output):
        return tokens.clone()
    return None


def _class_labels(model: Any, one_each: Tensor) -> Tensor:
    """Classes, or numbers, as the configuration says or, where it does not, transformers takes it to mean."""
    config = model.config
    kind = getattr(config, "problem_type", None)
    several = (len(one_each), config.num_labels)
    if kind == "multi_label_classification":
        return torch.zeros(several, dtype=input_dtype(model), device=one_each.device)
    if kind == "regression" or (kind is None and config.num_labels == 1):
        shape = several if config.num_labels > 1 else several[:1]
        return torch.zeros(shape, dtype=input_dtype(model), device=one_each.device)
    return one_each


def _transcripts(model: Any, one_each: Tensor) -> Tensor | None:
    """Of sound, for a loss that aligns it (CTC). That asks for values, which a model on the meta device has not."""
    if next(model.parameters()).is_meta:
        return None
    blank = getattr(model.config, "pad_token_id", None)
    letter = next(each for each in range(model.config.vocab_size) if each != blank)
    return one_each.new_full((len(one_each), _TRANSCRIBED), letter)


def _masked_patches(model: Any, batch: int, device: torch.device) -> dict[str, Any]:
    size, patch = (value if isinstance(value, int) else value[0] for value in _image_and_patch(model.config))
    return {"bool_masked_pos": torch.arange((size // patch) ** 2, device=device).expand(batch, -1) % 2 == 0}


def _image_and_patch(config: Any) -> tuple[Any, Any]:
    return config.image_size, getattr(config, "encoder_stride", config.patch_size)


def _output(model: Any) -> str:
    """The names of what its forward is annotated to return: "tuple | MaskedLMOutput"."""
    return str(inspect.signature(model.forward).return_annotation)
