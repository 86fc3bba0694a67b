"""Small language models of the usual kinds, for trials that end in minutes: random weights, no dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from invact import patchers

SMALL_BERT, SMALL_GPT2, SMALL_LLAMA = "small-bert", "small-gpt2", "small-llama"
SMALL_MODELS = {SMALL_BERT: "a small BERT", SMALL_GPT2: "a small GPT-2", SMALL_LLAMA: "a small Llama"}
"""In words, by the name that a trial knows them by."""

_WIDTH, _LAYERS, _HEADS = 128, 2, 4


def small_model(name: str, vocabulary: int, tokens: int) -> Callable[[], Any]:
    """Builds one of `SMALL_MODELS`, in training mode, as often as it is called.

    Args:
        vocabulary: how many different tokens there are.
        tokens: in the longest sample.

    Raises:
        patchers.MissingLibraryError: transformers is not installed.

    Example:
        >>> model = small_model("small-gpt2", vocabulary=90, tokens=32)()
        >>> type(model).__name__, sum(p.numel() for p in model.parameters())
        ('GPT2LMHeadModel', 107904)
    """
    try:
        import transformers
    except ImportError:
        raise patchers.MissingLibraryError(
            f"A trial of {SMALL_MODELS[name]} takes it from transformers, which is not installed. "
            "Install it with: pip install 'invact[trial]'"
        ) from None
    kind, config = {SMALL_BERT: _bert, SMALL_GPT2: _gpt2, SMALL_LLAMA: _llama}[name](transformers, vocabulary, tokens)

    def build() -> nn.Module:
        model: nn.Module = kind(config)
        return model.train()

    return build


def on_meta(build: Callable[[], Any]) -> Any:
    """The model without weights, for its shapes and its settings."""
    with torch.device("meta"):
        return build()


def _bert(transformers: Any, vocabulary: int, tokens: int) -> tuple[Any, Any]:
    return transformers.BertForMaskedLM, transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=4 * _WIDTH,
        max_position_embeddings=tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _gpt2(transformers: Any, vocabulary: int, tokens: int) -> tuple[Any, Any]:
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(
        vocab_size=vocabulary,
        n_embd=_WIDTH // 2,
        n_layer=_LAYERS,
        n_head=_HEADS // 2,
        n_positions=tokens,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # So that what the activation is given has a standard deviation of about 1, as in a wide model; 0.02 is GPT-2's
        # own, for 768. See what coarse derivatives do with less in docs/comparison.md.
        initializer_range=(_WIDTH // 2) ** -0.5,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def _llama(transformers: Any, vocabulary: int, tokens: int) -> tuple[Any, Any]:
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 2,
        intermediate_size=3 * _WIDTH,
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
