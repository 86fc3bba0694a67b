"""Why a site is inverted, derived, approximated or kept, in words. Each is explained on the docs' page of reasons."""

from __future__ import annotations

from collections.abc import Collection

# --- kept, whatever it would save -----------------------------------------------------------------------

EXACT = "exact gradients are asked for"
KEEPS_ONLY_OUTPUTS = "stock PyTorch already keeps only its output"
LEFT_OUT = "left out by include or exclude"
CHANGES_UNSEEN = "it computes with something that can change unseen"
REPLACED = "somebody has put another forward on it, which would go on to call the stock one"
NOT_CALLED = "not called in this forward pass"
ELSEWHERE = "called in another thread, where what autograd keeps is not seen"
NOT_ONE_TENSOR = "called with something other than one tensor"
NO_GRADIENT = "no gradient flows through it here"
HOOKED = "a hook changes or exchanges its output"
CHANGED_LATER = "its output is changed in place later"
IN_PLACE_AT_TIMES = "it works in place in one call and not in another"
ALREADY_INVERTED = "already inverted by an earlier patch"
ALREADY_APPROXIMATE = "already approximate by an earlier patch"

# --- kept, since nothing would be saved -----------------------------------------------------------------

INPUT_NOT_KEPT_EITHER = "its input is not kept either"
EXPRESSION_NO_LESS = "inverting an expression, it would keep no less"
KEEPS_NOTHING = "it keeps nothing here"
NOBODY_ELSE = "nobody else keeps its output: one tensor would only take the place of another"


def others_keep_its_input(classes: Collection[str]) -> str:
    return f"{_and(classes)} keeps its input anyway"


# --- inverted -------------------------------------------------------------------------------------------

SEVERAL_TENSORS = "it keeps several tensors; inverted, its output alone"


def others_keep_its_output(classes: Collection[str]) -> str:
    return f"{_and(classes)} keeps its output anyway, so its input can go"


def rounds_every_step(dtype: str, own: float, once: float) -> str:
    """Added where a site computes its curve in several steps and rounds each to 16 bits.

    Args:
        dtype: the name of the 16-bit type.
        own, once: relative errors against float64 of the site's steps, and of the curve rounded once.
    """
    return f"; in {dtype} it rounds every step and is {own:.1e} off float64, ours {once:.1e}"


def few_made_again(smallest_inverted: int) -> str:
    """Added where an inverted site was given fewer elements than these."""
    return f"; fewer than {smallest_inverted:,} elements, as here, are made again instead"


def many_made_again(largest_inverted: int) -> str:
    """Added where an inverted site was given more elements than these on a CPU."""
    return f"; more than {largest_inverted:,} elements, as here, are made again on a CPU instead"


# --- derived --------------------------------------------------------------------------------------------


def made_again(why_not_inverted: str) -> str:
    return f"its output is made again from its input: {why_not_inverted}"


# --- approximate ----------------------------------------------------------------------------------------


def in_steps(bits: int) -> str:
    return f"approximate: its derivative in steps of {1 << bits} values (FewBit, arXiv 2202.00441)"


def in_steps_since_nobody_else(bits: int) -> str:
    return f"{in_steps(bits)}; nobody else keeps its output"


def in_steps_everywhere(bits: int) -> str:
    return f"{in_steps(bits)}; asked for at every site"


def _and(classes: Collection[str]) -> str:
    return " and ".join(sorted(classes))
