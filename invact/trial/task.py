"""What a trial trains: a model with its weights, batches of data for it, and its loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from invact import patchers
from invact.bench.random_models import with_weights
from invact.errors.checks import Inputs
from invact.trial.data import DataError, Images, Text, load_images, load_text, resized
from invact.trial.small_models import SMALL_BERT, SMALL_MODELS, on_meta, small_model

DEFAULT_TOKENS = 128
SMALL_MODEL_TOKENS = 64
_MASKED = 0.15  # the share of tokens that BERT is asked for, as it was trained (Devlin et al., 2018)


class NotTrainableError(ValueError):
    """A model that a trial has no loss for, or whose loss is no finite number."""


@dataclass(frozen=True)
class Batch:
    """What the model is called with; `targets` where it does not compute its loss itself."""

    inputs: Inputs
    targets: Tensor | None = None


class AdaptersLike(Protocol):
    """What is trained beside frozen weights, told by `str` in words."""

    def put_into(self, model: nn.Module) -> nn.Module:
        """The model with its adapters."""


@dataclass(frozen=True)
class Origin:
    """What `make_task` was given: enough for another process to make the same task."""

    name: str | None = None
    data: str | None = None
    seq_len: int | None = None
    adapters: AdaptersLike | None = None

    def make(self) -> Task:
        return make_task(self.name, self.data, self.seq_len, self.adapters)


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        title: in words.
        samples: how many there are.
        build: makes the model, in training mode, on the CPU, with random weights.
        batch: makes a batch on the CPU from a seed, the number of the step, and the number of samples.
        loss: of a model, compiled or not, on a batch.
        origin: how another process makes it; None for what was put together by hand.
    """

    title: str
    samples: int
    build: Callable[[], nn.Module]
    batch: Callable[[int, int, int], Batch]
    loss: Callable[[Callable[..., Any], Batch], Tensor]
    origin: Origin | None = None


def make_task(
    name: str | None = None, data: str | None = None, seq_len: int | None = None, adapters: AdaptersLike | None = None
) -> Task:
    """The task for a model by name; for a small BERT without one.

    Args:
        name: as `invact patch` takes it, or one of `SMALL_MODELS`.
        data: a text file, a folder of images, or "digits"; by default the text or the images at hand.
        seq_len: tokens in a sample of text.
        adapters: that alone are trained, if any.

    Raises:
        DataError: the data can not be had, or are not what the model reads.
        NotTrainableError: the model reads neither text nor images.
        patchers.RequestError: as of `patchers.load` and `patchers.with_lora`.

    Example:
        >>> make_task("small-gpt2", seq_len=32).title
        "a small GPT-2 · GPT2LMHeadModel · Python's language reference, 32 tokens"
    """
    task = _task_of_full_model(name, data, seq_len)
    if adapters is not None:
        task = _with_adapters(task, adapters)
    return replace(task, origin=Origin(name, data, seq_len, adapters))


def _with_adapters(task: Task, adapters: AdaptersLike) -> Task:
    def build() -> nn.Module:
        return adapters.put_into(task.build()).train()

    return replace(task, title=f"{task.title} · {adapters}", build=build)


def _task_of_full_model(name: str | None, data: str | None, seq_len: int | None) -> Task:
    if name is None or name in SMALL_MODELS:
        return _small_task(name or SMALL_BERT, load_text(data), seq_len or SMALL_MODEL_TOKENS)
    model = patchers.load(name)
    inputs = patchers.example_inputs(model, 1, loss=False)
    shapes = [tuple(x.shape[1:]) for x in (inputs.values() if isinstance(inputs, dict) else inputs)]
    images = [shape for shape in shapes if len(shape) == 3]
    title = f"{name} · {type(model).__name__}"
    if isinstance(inputs, dict) and {"input_features", "input_values"} & inputs.keys():
        raise NotTrainableError(f"{name} reads audio, and a trial has text and images only. Name another model.")
    if not images:
        length = min(seq_len or DEFAULT_TOKENS, shapes[0][0])
        return _language_task(title, model, lambda: with_weights(name), load_text(data), length)
    (size,) = images
    return _image_task(title, model, lambda: with_weights(name), load_images(data, size), size, shapes)


def _picked(samples: int, seed: int, step: int, batch_size: int) -> tuple[Tensor, torch.Generator]:
    """The numbers of the samples of a batch, and the generator for whatever else is random in it."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return torch.randperm(samples, generator=generator)[torch.arange(batch_size) % samples], generator


# --- text ---------------------------------------------------------------------------------------------


def _small_task(name: str, text: Text, seq_len: int) -> Task:
    build = small_model(name, vocabulary=text.alphabet + 2, tokens=seq_len)
    model = on_meta(build)
    return _language_task(f"{SMALL_MODELS[name]} · {type(model).__name__}", model, build, text, seq_len)


def _language_task(title: str, model: Any, build: Callable[[], nn.Module], text: Text, seq_len: int) -> Task:
    kind = _language_loss(model)
    if kind is None:
        raise NotTrainableError(
            f"{type(model).__name__} is not trainable here: it is no masked, causal or encoder-decoder language model. "
            "Name one that is, such as bert-base-uncased or gpt2."
        )
    windows = len(text.ranks) // seq_len
    if windows == 0:
        raise DataError(f"{text.name} has {len(text.ranks)} characters, fewer than one sample of {seq_len} tokens.")
    # From the top of the vocabulary down, away from padding: the mask, a rare character, the frequent ones.
    mask = model.config.get_text_config().vocab_size - 1
    ids = (mask - 2 - text.ranks.clamp(max=mask - 2)).where(text.ranks < mask - 1, mask - 1)
    samples = ids[: windows * seq_len].view(windows, seq_len)

    def batch(seed: int, step: int, batch_size: int) -> Batch:
        picked, generator = _picked(windows, seed, step, batch_size)
        tokens = samples[picked]
        if kind == "causal":
            return Batch({"input_ids": tokens, "labels": tokens})
        asked = torch.rand(tokens.shape, generator=generator) < _MASKED
        return Batch({"input_ids": tokens.where(~asked, mask), "labels": tokens.where(asked, -100)})

    return Task(f"{title} · {text.name}, {seq_len} tokens", windows, build, batch, _own_loss)


def _language_loss(model: Any) -> str | None:
    """ "masked", "causal", or None for what is no language model of transformers."""
    if "labels" not in inspect.signature(model.forward).parameters:
        return None
    from transformers.models.auto import modeling_auto as names

    if type(model).__name__ in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "masked"
    left_to_right = {
        *names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }
    return "causal" if type(model).__name__ in left_to_right else None


def _own_loss(forward: Callable[..., Any], batch: Batch) -> Tensor:
    assert isinstance(batch.inputs, dict)
    output = forward(**batch.inputs)
    loss = getattr(output, "loss", None)
    if loss is None:
        raise NotTrainableError(f"The model is not trainable here: its {type(output).__name__} holds no loss.")
    return loss  # type: ignore[no-any-return]


# --- images -------------------------------------------------------------------------------------------


def _image_task(
    title: str,
    model: Any,
    build: Callable[[], nn.Module],
    images: Images,
    size: tuple[int, int, int],
    shapes: list[tuple[int, ...]],
) -> Task:
    reads_text = next((shape[0] for shape in shapes if len(shape) == 1), None)
    library = patchers.library_of(model)
    of_transformers = library is not None and library.name == "transformers"
    takes_labels = of_transformers and "labels" in inspect.signature(model.forward).parameters
    classes: int = model.config.num_labels if of_transformers else getattr(model, "num_classes", 1)

    def batch(seed: int, step: int, batch_size: int) -> Batch:
        picked, _ = _picked(len(images.pixels), seed, step, batch_size)
        pixels, labels = resized(images.pixels[picked], size), images.labels[picked]
        if reads_text is not None:
            tokens = torch.stack([_spelled(images.classes[label], reads_text, _vocabulary(model)) for label in labels])
            if of_transformers:
                return Batch({"input_ids": tokens, "pixel_values": pixels, "return_loss": True})
            return Batch((pixels, tokens))
        if not of_transformers:
            return Batch((pixels,), labels % classes)
        return Batch({"pixel_values": pixels, **({"labels": labels % classes} if takes_labels else {})})

    loss = _own_loss if of_transformers else _contrastive_loss if reads_text is not None else _class_loss
    sized = f"{images.name}, {size[1]}x{size[2]} pixels"
    return Task(f"{title} · {sized}", len(images.pixels), build, batch, loss)


def _class_loss(forward: Callable[..., Any], batch: Batch) -> Tensor:
    assert batch.targets is not None
    return F.cross_entropy(forward(*batch.inputs), batch.targets)


def _contrastive_loss(forward: Callable[..., Any], batch: Batch) -> Tensor:
    """CLIP's: which text belongs to which image, and the other way about."""
    image_features, text_features, scale, *_ = forward(*batch.inputs)
    logits = scale * image_features @ text_features.T
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _spelled(name: str, length: int, vocabulary: int) -> Tensor:
    """The letters of a class, then the highest token, by which CLIP knows the end of a text."""
    letters = [min(ord(letter), vocabulary - 2) for letter in name[: length - 1]]
    return F.pad(torch.tensor([*letters, vocabulary - 1]), (0, length - 1 - len(letters)))


def _vocabulary(model: nn.Module) -> int:
    return next(layer for layer in model.modules() if isinstance(layer, nn.Embedding)).num_embeddings
