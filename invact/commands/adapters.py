"""What `--lora-rank`, `--lora-dropout`, `--lora-targets` and `--quantize` make of a model, for a dry run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from invact.commands.output import fail

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Adapters:
    """Adapters as asked for.

    Attributes:
        rank: of LoRA.
        dropout: of what the adapters read.
        targets: "all-linear", or names of layers.
        in_4bit: whether the frozen weights are.
    """

    rank: int
    dropout: float
    targets: str | list[str]
    in_4bit: bool

    def put_into(self, model: nn.Module) -> nn.Module:
        """The model with its adapters; raises a `RequestError` where it can have none."""
        from invact import patchers

        base = patchers.with_4bit_base(model) if self.in_4bit else model
        adapted: nn.Module = patchers.with_lora(base, self.rank, self.dropout, self.targets)
        return adapted

    def __str__(self) -> str:
        from invact.patchers import lora_in_words

        lora: str = lora_in_words(self.rank, self.dropout, self.targets)
        return f"{lora}, base in 4 bits" if self.in_4bit else lora


def asked_for(rank: int | None, dropout: float | None, targets: str | None, quantize: str | None) -> Adapters | None:
    """What the options say, or None where they ask for no adapters; fails where they do not go together."""
    if targets is not None and not _names(targets):
        fail("--lora-targets names no layer. Name some, as in --lora-targets q_proj,v_proj, or leave it out for all.")
    if rank is not None:
        return Adapters(rank, dropout or 0.0, _names(targets), in_4bit=quantize is not None)
    if quantize is not None:
        fail(f"Weights in {quantize} do not train by themselves. Add adapters that do, as in --lora-rank 16.")
    for option, given in {"--lora-dropout": dropout, "--lora-targets": targets}.items():
        if given is not None:
            fail(f"{option} says how LoRA adapters are to be, and there are none. Add their rank: --lora-rank 16.")
    return None


def _names(targets: str | None) -> str | list[str]:
    if targets is None or targets == "all-linear":
        return "all-linear"
    return [name.strip() for name in targets.split(",") if name.strip()]
