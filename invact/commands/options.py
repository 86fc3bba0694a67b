"""What may be given to more than one command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from invact.commands.output import fail

if TYPE_CHECKING:
    import torch


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def memory(text: str) -> int:
    """As `invact.report.amounts.memory_bytes`, refused as a bad parameter."""
    from invact.report.amounts import memory_bytes

    try:
        return memory_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


MODEL_NAMES = (
    "bert-base-uncased, timm/vit_base_patch16_224, open_clip/ViT-B-32, a hub name org/name, "
    "or a directory with a config.json."
)

GpuMemory = Annotated[
    int | None,
    typer.Option("--gpu-memory", parser=memory, metavar="SIZE", help="What is to be fitted, as in 24GiB."),
]
Exact = Annotated[
    bool,
    typer.Option("--exact", help="Invert nothing, derive instead: gradients are bit for bit the stock ones."),
]
FewBits = Annotated[
    int | None,
    typer.Option(
        "--few-bits",
        min=1,
        max=4,
        metavar="1..4",
        help="Approximate gradients, in so many bits per element, where nothing exact helps.",
    ),
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, metavar="FILE", help="Write a page that opens offline.")
]


LoraRank = Annotated[
    int | None, typer.Option("--lora-rank", help="Train LoRA adapters of PEFT's of this rank, and nothing else.")
]
LoraDropout = Annotated[
    float | None, typer.Option("--lora-dropout", help="Of what the adapters read. Default: 0.", show_default=False)
]
LoraTargets = Annotated[
    str | None,
    typer.Option(
        "--lora-targets",
        metavar="NAMES",
        help="Layers that get adapters: all-linear, or names as in q_proj,v_proj. Default: all-linear.",
        show_default=False,
    ),
]


class Quantization(str, Enum):
    """What the frozen weights are loaded in."""

    in_4bit = "4bit"


Quantize = Annotated[
    Quantization | None,
    typer.Option("--quantize", help="Count the frozen weights as QLoRA loads them: NF4, scales quantised too."),
]


def one_name(command: str, name: str | None, model: str | None) -> str | None:
    """The model, whether it was named by itself or after `--model`; None if neither was done."""
    if name is not None and model is not None:
        fail(f"The model is named twice, {name} and --model {model}. Name it once: invact {command} {name}")
    return name if model is None else model


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
