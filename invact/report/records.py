"""What a plan consists of: a site, a fused norm, a block that is checkpointed; each with why and how many bytes."""

from __future__ import annotations

from dataclasses import dataclass

INVERT = "invert"
DERIVE = "derive"
APPROXIMATE = "approximate"
KEEP = "keep"


@dataclass(frozen=True)
class Site:
    """One place in a model where a pointwise activation is computed.

    Attributes:
        path: dotted path of the module, by the first place where it is registered; for an expression in a method
            "path.method:curve".
        activation: the curve's name, such as "gelu_tanh".
        module_class: class name of the module found there, or the expression as written, such as "F.gelu(…)".
        action: "invert"; "derive", if the output is made again from what is kept; "approximate", if its derivative is
            one of a few values, which is done only with `few_bits`; or "keep".
        reason: why, in plain words.
        bytes_saved: fewer bytes kept for backward when this site is inverted or approximated; 0 if it is kept.
    """

    path: str
    activation: str
    module_class: str
    action: str
    reason: str
    bytes_saved: int = 0


@dataclass(frozen=True)
class FusedNorm:
    """A norm that the model writes out in steps and that one operator computes instead.

    Attributes:
        path: dotted path of the module.
        module_class: class name of the module found there.
        reason: why, and how both round, in plain words.
        bytes_moved_in_steps, bytes_moved: read and written, forward and backward, in steps and by the one operator.
    """

    path: str
    module_class: str
    reason: str
    bytes_moved_in_steps: int
    bytes_moved: int


@dataclass(frozen=True)
class CheckpointedBlock:
    """A block whose forward is run once more in backward, so that it keeps only what it is given.

    Attributes:
        path: dotted path of the module.
        bytes_won: fewer bytes kept between forward and backward.
        share: of what forward computes and moves, which is done twice.
    """

    path: str
    bytes_won: int
    share: float
