"""What every note of an object can do, and what stands for what was not there."""

from __future__ import annotations

from typing import Any, Protocol

MISSING: Any = object()
"""Stands for an attribute, a key or a content that was not there."""


class Noted(Protocol):
    """The state of one object, as it was when this was made."""

    def put_back(self) -> None:
        """Makes the object what it was; touches nothing that has not changed."""
