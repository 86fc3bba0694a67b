"""What a plan is asked for: the arguments of `invact.plan`, checked, in one object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from invact.errors.checks import check_autocast, check_exact, check_few_bits, check_patterns

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Options:
    """The arguments of `invact.plan` besides the model and its inputs.

    Args:
        autocast, include, exclude, exact, few_bits: as of `invact.plan`.
        everywhere: for comparison: `few_bits` at every site that keeps more than its output, whoever else keeps
            what; nothing is inverted and nothing is derived.

    Raises:
        TypeError, ValueError: as `invact.plan` does.

    Example:
        >>> options = Options(include="encoder.*", exclude=["*.act"])
        >>> options.allow("encoder.0.norm"), options.allow("encoder.0.act"), options.allow("head")
        (True, False, False)
    """

    autocast: torch.dtype | None = None
    include: Patterns = None
    exclude: Patterns = None
    exact: bool = False
    few_bits: int | None = None
    everywhere: bool = False

    def __post_init__(self) -> None:
        check_autocast(self.autocast)
        check_patterns(self.include, self.exclude)
        check_exact(self.exact)
        check_few_bits(self.few_bits, self.exact)

    def allow(self, path: str) -> bool:
        """Whether `include` and `exclude` leave this path."""
        if self.include is not None and not matches(path, self.include):
            return False
        return self.exclude is None or not matches(path, self.exclude)


def matches(path: str, patterns: str | Sequence[str]) -> bool:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return any(fnmatchcase(path, pattern) for pattern in patterns)
