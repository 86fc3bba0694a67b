"""What was planned for, in words."""

from __future__ import annotations


def training_in_words(
    device: str, autocast: str | None, attention: str, *, exact: bool, few_bits: int | None, with_loss: bool
) -> str:
    """What was planned for.

    Args:
        device: its type, such as "cuda".
        autocast: the name of a dtype, or None.
        attention: "fused" or "math".
    """
    words = [f"training on {device}"]
    if autocast is not None:
        words.append(f"autocast to {autocast}")
    if device == "cuda":
        words.append("fused attention" if attention == "fused" else "attention by matrix products")
    if exact:
        words.append("exact")
    if few_bits is not None:
        words.append(f"few_bits={few_bits}, approximate where nothing exact helps")
    words.append("with its loss" if with_loss else "without a loss")
    return ", ".join(words)
