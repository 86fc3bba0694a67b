"""What may be given to more than one command."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch


class Dtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Bits(str, Enum):
    one = "1"
    two = "2"
    four = "4"


def memory_bytes(text: str) -> int:
    """As "24GiB" or "80 GB"; without a unit, bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|B)?", text.strip(), flags=re.IGNORECASE)
    if match is None or not float(match[1]):
        raise typer.BadParameter(f"{text!r} is no amount of memory. Write it as 24GiB.")
    number, prefix, binary = match.groups()
    exponent = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


GpuMemory = Annotated[
    int | None,
    typer.Option("--gpu-memory", parser=memory_bytes, metavar="SIZE", help="Say which batch fits, as in 24GiB."),
]
SideBits = Annotated[
    Bits,
    typer.Option(
        "--side-bits", help="Per element, for curves with two sides; 4 make bf16 gradients as exact as stock's."
    ),
]
HtmlFile = Annotated[
    Path | None, typer.Option("--html", dir_okay=False, metavar="FILE", help="Write a page that opens offline.")
]


def torch_dtype(name: str) -> torch.dtype:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
