"""Amounts of memory: read as people write them, and written."""

from __future__ import annotations

import re
from collections.abc import Mapping

LEAST_MEMORY = 1 << 20  # bytes; no GPU has less


def memory_bytes(memory: str | int) -> int:
    """As "24GiB" or "80 GB", capital letters or not, where the unit must be there; or a number of bytes.

    Raises:
        TypeError: it is neither a text nor a whole number.
        ValueError: it is no amount of memory, or less than `LEAST_MEMORY`.

    Example:
        >>> memory_bytes("24GiB"), memory_bytes("80 GB")
        (25769803776, 80000000000)
    """
    if isinstance(memory, bool) or not isinstance(memory, (str, int)):
        raise TypeError(f"memory is of type {type(memory).__name__}. Write it as '24GiB', or pass a number of bytes.")
    nbytes = _parsed(memory) if isinstance(memory, str) else memory
    if nbytes < LEAST_MEMORY:
        raise ValueError(f"{memory!r} is less than any GPU has. Write it as 24GiB.")
    return nbytes


def _parsed(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B?|(B))?", text.strip(), flags=re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no amount of memory. Write it as 24GiB.")
    number, prefix, binary, byte = match.groups()
    if not prefix and not byte:
        raise ValueError(f"{text!r} has no unit. Write it as {number}GiB or {number}GB.")
    exponent = " KMGT".index(prefix.upper()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** exponent)


def in_words(parts: Mapping[str, int]) -> str:
    """What some bytes are for, as "1.5 KiB weights, 12 B temporary"."""
    return ", ".join(f"{format_bytes(nbytes)} {kind}" for kind, nbytes in parts.items())


def format_bytes(nbytes: int) -> str:
    """Bytes with a binary unit: 1536 is "1.5 KiB"."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def counted(number: int, unit: str) -> str:
    """As "1 block" or "3 blocks"."""
    return f"{number} {unit if number == 1 else unit + 's'}"
