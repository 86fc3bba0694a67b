"""Small models of the usual kinds in training mode, with inputs: with labels where a model computes its loss."""

from __future__ import annotations

from typing import Any

import peft
import timm
import torch
import transformers
from torch import nn

WORDS, TOKENS = 512, 64


def token_inputs(batch: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.arange(batch * TOKENS).view(batch, TOKENS) % WORDS
    return {"input_ids": ids, "labels": ids}


def gpt2(dropout: float = 0.1, layers: int = 2, **options: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=TOKENS, n_embd=64, n_layer=layers, n_head=2, resid_pdrop=dropout,
        embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).train()


def llama(layers: int = 2, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def tied_llama() -> nn.Module:
    return llama(tie_word_embeddings=True)


def lora_llama() -> nn.Module:
    config = peft.LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config).train()


def frozen_gpt2() -> nn.Module:
    """The embedding and the first half of the layers do not train."""
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[:1].requires_grad_(False)
    return model


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
        max_position_embeddings=TOKENS,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).train()


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).train()


def vit(layers: int = 2, dropout: float = 0.1) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", depth=layers, embed_dim=64, num_heads=2, img_size=64, num_classes=8,
        proj_drop_rate=dropout, drop_path_rate=dropout,
    ).train()  # fmt: skip


def resnet() -> nn.Module:
    """With batch norm and activations in place; optimizer states are large beside what it keeps."""
    return timm.create_model("resnet18", layers=(1, 1, 1, 1), num_classes=8).train()


def sequential(blocks: int = 4) -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64))

    return nn.Sequential(*(block() for _ in range(blocks))).train()


def inputs_for(model: nn.Module, batch: int = 4) -> Any:
    """Images for what reads images, rows for a Sequential, else tokens with labels."""
    if isinstance(model, nn.Sequential):
        return (torch.randn(64 * batch, 64),)
    if hasattr(model, "pretrained_cfg"):  # timm's
        return (torch.randn(batch, 3, 64, 64),)
    return token_inputs(batch)
