"""Looks for what a recipe reads: the handle of an operator's output, or a recipe of its own for that.

Which handle stands for which output is noted, weakly, with the node that made it. Nothing else is held.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

from torch import Tensor

from invact.deriving.distributed_parameters import copied, is_parameter, parameters_may_go
from invact.deriving.handles import DEEPEST, MOST_STEPS, Awaited, Derived, Handle, Kept
from invact.deriving.journal import journal_here
from invact.deriving.layouts import is_plain
from invact.deriving.rules.registry import RULES, SUMS, VIEWS
from invact.deriving.saved_by_node import kept_by
from invact.pytorch.backward import node_name
from invact.pytorch.saved_tensor_hooks import outer_hooks

MOST_SEARCHED = 64
"""Operators that are looked at for one tensor: the longest recipe that pays has a quarter of them, views included."""

# Under these, with its number, stands what is known of a node's output, in the dictionary that autograd has for such
# notes: its handle; what waits for it; that no recipe was found, and by which hooks.
FOUND, _AWAITED, _NOT_FOUND = "invact found", "invact awaited", "invact not found"

_COPIES = ("CloneBackward0", "ToCopyBackward0", "CatBackward0")

_EXACT = {*VIEWS, "AddBackward0", "DivBackward0", "MulBackward0", "NegBackward0", "SubBackward0"}

_PARTS = {
    *("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0"),
    *("UnsafeSplitBackward0", "UnsafeSplitWithSizesBackward0"),
}

# Made of one operand, if at all; what else they read they keep themselves.
_OF_ONE = {*VIEWS, "CloneBackward0", "NativeDropoutBackward0", "ToCopyBackward0"}

_LEAF = "torch::autograd::AccumulateGrad"


class Search:
    """Finds, or makes, the handle of what an operator gave, for a recipe that reads it.

    Attributes:
        outer: somebody else's hooks outside of ours, to which what is kept is passed on, or None.
        outside: the second of them; handles are found where theirs is the same.
        journal: where recipes are noted while a plan is made, or None.
    """

    def __init__(self) -> None:
        self.journal = journal_here()
        self.outer = outer_hooks()
        self.outside = None if self.outer is None else self.outer[1]
        self.parameters_may_go = parameters_may_go()
        self._token = object()  # for notes with nodes, which must hold nothing
        self._left = 0  # of the operators that may still be looked at for a tensor
        self._parts_wait = False  # whether something waits for a tensor of which it reads a part

    def _kept(self, tensor: Tensor) -> Kept:
        """An output without its history; what has none is kept itself: without a gradient it comes back as it is."""
        kept = Kept(tensor if tensor.grad_fn is None else tensor.detach(), tensor._version, self.outer)
        if self.parameters_may_go and is_parameter(tensor):
            copy = copied(tensor)
            kept.may_be_read = copy is not None
            kept.apart = None if copy is None else Kept(copy, copy._version, self.outer)
        return kept

    def _find(self, node: Any, number: int) -> Handle | None:
        """The handle of an output: noted, a leaf, or by a recipe of its own."""
        metadata = node.metadata
        known = self._noted(metadata, (FOUND, number))
        if known is not None:
            return (known.apart or known) if known.may_be_read else None
        name = node_name(node)
        if name == _LEAF:
            return self._leaf(node.variable)
        rule = RULES.get(name)
        if rule is None or not self._left or metadata.get((_NOT_FOUND, number)) is self._token:
            return None
        self._left -= 1
        handle = rule(node, number, self._find)
        if handle is None or not self._can_be_run(handle):
            if self._left:  # else there may be one, had it been looked for further
                metadata[_NOT_FOUND, number] = self._token
            return None
        if self.journal is not None:
            self.journal.recipe(handle, node, number)
        metadata[FOUND, number] = weakref.ref(handle)
        return handle

    def _leaf(self, leaf: Tensor) -> Kept | None:
        """What its operator has not kept: nothing tells what it held then, unless it never held anything else.

        Parameters are stepped between one forward pass and the next, and are not read.
        """
        return None if leaf._version or is_parameter(leaf) else self._kept(leaf)

    def _can_be_run(self, recipe: Derived) -> bool:
        """Whether it is short enough, and all that it reads is kept inside the same hooks of others as this here."""
        return recipe.steps <= MOST_STEPS and recipe.depth <= DEEPEST and recipe.outside is self.outside

    def _noted(self, metadata: dict[Any, Any], key: tuple[str, int]) -> Handle | None:
        reference = metadata.get(key)
        known: Handle | None = None if reference is None else reference()
        return known if known is not None and known.outside is self.outside else None

    def _note(self, metadata: dict[Any, Any], number: int, handle: Handle) -> None:
        metadata[FOUND, number] = weakref.ref(handle)
        for waiting in metadata.pop((_AWAITED, number), ()):
            awaited = waiting()
            if awaited is not None:
                awaited.filled(handle)

    def _is_surely_not_at_hand(self, node: Any, number: int) -> bool:
        """Of an operand of a sum, most of which are residual sums: what a matrix product or another sum gave, or what
        one operand alone was made of that. Told in a few steps, where a search would take long to fail."""
        while node is not None:
            if self._noted(node.metadata, (FOUND, number)) is not None:
                return False
            name = node_name(node)
            if name not in _OF_ONE and not (name == "MulBackward0" and kept_by(node, "self") is None):
                return name in SUMS or (name not in RULES and name != _LEAF)
            node, number = node.next_functions[0]
        return True

    @staticmethod
    def _laid_out_alike(handle: Handle, tensor: Tensor, name: str) -> bool:
        """Whether copies on the way to a tensor, which the node of this name gave, will lie as they lay.

        A copy that is kept, or a view of it, tells how it lies; and what is made element by element of one that is not
        contiguous is not contiguous either.
        """
        base = tensor if tensor._base is None else tensor._base
        if name not in _COPIES and (base.grad_fn is None or node_name(base.grad_fn) not in _COPIES):
            return base.is_contiguous()
        views = []
        while isinstance(handle, Derived) and not handle.moves:
            views.append(handle)
            handle = handle.sources[0]
        if not isinstance(handle, Derived) or any(source.unsure for source in handle.sources):
            return False
        handle.stride = base.stride()
        for told in (handle, *views):
            told.unsure = False
        return True

    # --- what is not there yet ---

    def _later(self, tensor: Tensor, node: Any, number: int) -> Kept | None:
        """Keeps a tensor until somebody keeps what it can be made of, as `x * sigmoid(x)` does, the sigmoid first."""
        name = node_name(node)
        if name in SUMS and not _turns_a_part(node):  # most are residual sums, of which nothing would come
            return None
        self._left = MOST_SEARCHED
        recipe = RULES[name](node, number, self._find_or_await)
        if recipe is None or not recipe.steps or not self._can_be_run(recipe):
            return None
        if recipe.unsure and not (_is_exact_down_to_copies(node) or self._laid_out_alike(recipe, tensor, name)):
            return None
        waiting = recipe.awaited()
        if recipe.joins and any(awaited.count <= tensor.numel() for awaited in waiting):
            return None  # but of parts of what is kept whole, as rotated keys are of one projection
        self._parts_wait = self._parts_wait or any(awaited.count > tensor.numel() for awaited in waiting)
        kept = self._kept(tensor)
        recipe.stride = tensor.stride()
        kept.later = recipe
        if self.journal is not None:
            self.journal.recipe(recipe, node, number)
        for awaited in waiting:
            awaited.kept = weakref.ref(kept)
        return kept

    def _find_or_await(self, node: Any, number: int) -> Handle | None:
        """`_find`, or in its stead what waits until the output is kept."""
        found = self._find(node, number)
        if found is not None:
            return found
        name = node_name(node)
        rule = RULES.get(name)
        summed = name in SUMS
        if name == _LEAF or (summed and not _turns_a_part(node)):
            return None  # a note at a leaf would stay
        count = math.prod(node._input_metadata[number].shape)
        if rule is not None and self._left:
            self._left -= 1
            handle = rule(node, number, self._find_or_await)
            waiting = handle.awaited() if handle is not None and not handle.steps else []
            of_a_part = any(awaited.count > count for awaited in waiting)  # who keeps a part keeps all of its memory
            if summed or of_a_part or not waiting:  # else a view, which may itself be kept
                if handle is not None and self.journal is not None:
                    self.journal.recipe(handle, node, number)
                return handle
        if summed:
            return None  # it may have been added up in place, as linear layers do
        awaited = Awaited(self.outside, count)
        node.metadata.setdefault((_AWAITED, number), []).append(weakref.ref(awaited))
        return awaited

    def _part_of_what_is_awaited(self, view: Tensor, node: Any, number: int) -> Handle | None:
        """Keeps all of a tensor of which a part is kept, if something waits for it, and the part as a view of that.

        It takes no more memory: a view keeps all of it anyway.
        """
        whole = view._base
        if whole is None or whole.grad_fn is None or not is_plain(whole):
            return None
        if whole._version or whole.numel() <= view.numel():
            return None
        base: Any = whole.grad_fn
        between: list[tuple[Any, int]] = []
        above, output = node, number
        while above is not base and above is not None and node_name(above) in VIEWS:
            between.append((above, output))
            above, output = above.next_functions[0]
        awaited = [(above, output) for above, output in between if _is_awaited(above, output)]
        if above is not base or not (awaited or _is_awaited(base, whole.output_nr)):
            return None
        kept = self._kept(whole)
        self._note(base.metadata, whole.output_nr, kept)
        self._token, self._left = object(), MOST_SEARCHED  # what was not found before may be now
        for above, output in awaited:
            if (handle := self._find(above, output)) is not None:
                self._note(above.metadata, output, handle)
        part = self._find(node, number)
        if not isinstance(part, Derived):  # a view without a rule
            same = self._kept(view)
            same.beside = kept
            return same
        part.stride = view.stride()
        part.wanted_again()
        return part


def _is_exact_down_to_copies(node: Any) -> bool:
    """Whether all that was done to copies since is right to the last digit however they lay."""
    left, nodes = MOST_SEARCHED, [node]
    while nodes and left:
        left, node = left - 1, nodes.pop()
        name = None if node is None else node_name(node)
        if name in _EXACT:
            nodes += [producer for producer, _ in node.next_functions]
        elif name in RULES and name not in _COPIES:
            return False
    return not nodes


def _is_awaited(node: Any, number: int) -> bool:
    return any(waiting() is not None for waiting in node.metadata.get((_AWAITED, number), ()))


def _turns_a_part(node: Any) -> bool:
    """Whether a sum is as of the queries and keys of one projection: `x * cos + y * sin`, of a part x of a tensor."""
    if not all(summand is not None and node_name(summand) == "MulBackward0" for summand, _ in node.next_functions[:2]):
        return False
    while node is not None:
        name = node_name(node)
        if name in _PARTS or not (name in SUMS or name in _OF_ONE or name == "MulBackward0"):
            return name in _PARTS
        node = node.next_functions[0][0]
    return False
