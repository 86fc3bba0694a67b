"""What checkpointing a block changes in a step, foreseen from a step in which none is checkpointed.

To simulate a step for each choice would take long. This composes it from one: in forward a chosen block keeps what it
was given; before its part of backward, its forward stands once more.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from invact.fitting.lifetimes import NEVER, WEIGHT, Allocation, Call, levels
from invact.fitting.step import Step
from invact.fitting.work import FLOPS_A_BYTE


@dataclass(frozen=True)
class Block:
    """A block of a step in which it is not checkpointed.

    Attributes:
        path: of the module.
        call: its forward.
        backward: the moments at which its part of backward begins, and has ended.
        bytes_won: what it keeps between forward and backward, less what it is given, which is kept then.
        share: of what forward computes and moves; so much of a forward is run once more.
    """

    path: str
    call: Call
    backward: tuple[int, int]
    bytes_won: int
    share: float


def blocks_of(step: Step, paths: Iterable[str]) -> list[Block]:
    """The blocks of a step that keep more than they are given and compute the same once more, in the order of forward.

    Args:
        step: one taken with work counted.
        paths: of the modules; see `invact.fitting.blocks`.
    """
    costs = {path: _cost(step, call.began, call.ended) for path in paths if (call := step.calls.get(path))}
    whole = _cost(step, 0, step.forward_ended)
    backward = _spans_in_backward(step, list(costs))
    blocks = []
    for path, cost in costs.items():
        if path in backward:
            call = step.calls[path]
            block = Block(path, call, backward[path], _bytes_won(step, call), cost / whole)
            if block.bytes_won > 0 and _may_run_again(step, call):
                blocks.append(block)
    return sorted(blocks, key=lambda block: block.call.began)


def in_order(blocks: Sequence[Block]) -> list[Block]:
    """Those first that win most bytes for the time they take; of those that are alike, the first in forward.

    What is run once more then is run when most of the others has been let go.
    """

    def worth(block: Block) -> float:
        return float(f"{block.bytes_won / max(block.share, 1e-9):.2g}")

    return sorted(blocks, key=lambda block: (-worth(block), block.call.began))


def foreseen_peak(step: Step, chosen: Collection[Block]) -> int:
    """About the peak of the step, in bytes, if these blocks were checkpointed."""
    longer = _Longer(step, chosen)
    alive = levels(((piece.nbytes, piece.born, piece.died) for piece in longer.pieces()), longer.ended)
    alive[-1] += step.held.temporary
    return step.resident + max(alive)


def foreseen_step(step: Step, chosen: Collection[Block]) -> Step:
    """The step as it would be, about, if these blocks were checkpointed; the calls are those of the step without."""
    longer = _Longer(step, chosen)
    weights = [(n, a) for n, a in enumerate(step.allocations) if a.operator == WEIGHT]
    pieces = [_Piece(n, a.born, a.died, a.nbytes) for n, a in weights]
    pieces = sorted([*pieces, *longer.pieces()], key=lambda piece: piece.born)
    allocations = []
    for piece in pieces:
        made = step.allocations[piece.number]
        died = NEVER if piece.died > longer.ended else piece.died
        allocations.append(replace(made, born=piece.born, died=died))
    numbered = list(enumerate(pieces))
    return replace(
        step,
        allocations=allocations,
        backward_ended=longer.ended,
        gradients=frozenset(n for n, piece in numbered if piece.number in step.gradients),
        kept=frozenset(n for n, piece in numbered if piece.born < step.forward_ended < piece.died),
    )


class _Piece(NamedTuple):
    """What one allocation comes to, or one of its two lives."""

    number: int  # of the allocation
    born: int
    died: int
    nbytes: int


class _Longer:
    """The moments of a step in which some blocks run twice."""

    def __init__(self, step: Step, chosen: Collection[Block]) -> None:
        self._step = step
        in_backward = sorted(chosen, key=lambda block: block.backward[0])
        self._starts = [block.backward[0] for block in in_backward]
        lengths = [block.call.ended - block.call.began for block in in_backward]
        self._inserted = list(itertools.accumulate(lengths, initial=0))
        moved = [at + inserted for at, inserted in zip(self._starts, self._inserted, strict=False)]
        self._again = {block.path: at for block, at in zip(in_backward, moved, strict=True)}
        self._in_forward = sorted(chosen, key=lambda block: block.call.began)
        self._began = [block.call.began for block in self._in_forward]
        self._held_until: dict[int, int] = {}
        for block in chosen:
            for number in block.call.given:
                self._held_until[number] = max(self._held_until.get(number, 0), block.backward[1])
        self.ended = self._shifted(step.backward_ended)

    def pieces(self) -> Iterator[_Piece]:
        """All that is allocated but for weights, in the moments of the longer step."""
        step, last = self._step, self._step.backward_ended + 1
        for number, allocation in enumerate(step.allocations):
            if allocation.operator == WEIGHT:
                continue
            born, nbytes = allocation.born, allocation.nbytes
            died = min(max(allocation.died, self._held_until.get(number, 0)), last)
            block = self._block_around(born)
            if block is None:
                yield _Piece(number, self._shifted(born), self._shifted(died), nbytes)
                continue
            call, second = block.call, self._again[block.path]
            outlives = number in call.gives or number in self._held_until
            yield _Piece(number, born, self._shifted(died) if outlives else min(died, call.ended), nbytes)
            if died <= call.ended:
                dies_again = second + died - call.began
            elif died > block.backward[0] and not outlives:
                dies_again = self._shifted(died)
            else:
                dies_again = second + call.ended - call.began
            yield _Piece(number, second + born - call.began, dies_again, nbytes)

    def _shifted(self, moment: int) -> int:
        """Where a moment of the step is in the longer one; a block's backward after its second forward."""
        return moment + self._inserted[bisect.bisect_right(self._starts, moment)]

    def _block_around(self, born: int) -> Block | None:
        """The chosen block in whose forward something is made."""
        place = bisect.bisect_right(self._began, born) - 1
        if place < 0 or born >= min(self._in_forward[place].call.ended, self._step.forward_ended):
            return None
        return self._in_forward[place]


def _cost(step: Step, began: int, ended: int) -> float:
    """Bytes moved and operations of a stretch of forward, in bytes; what is written is read as well."""
    written = sum(a.nbytes for a in step.allocations if began <= a.born < ended and a.operator != WEIGHT)
    flops = step.work.flops((began, ended)) if step.work is not None else 0
    return 2 * written + flops / FLOPS_A_BYTE


def _bytes_won(step: Step, call: Call) -> int:
    made = range(_first(step.allocations, call.began), _first(step.allocations, call.ended))
    kept = sum(step.allocations[n].nbytes for n in made if n in step.kept and n not in call.gives)
    given = sum(step.allocations[n].nbytes for n in call.given if n not in step.kept and not _is_weight(step, n))
    return kept - given


def _may_run_again(step: Step, call: Call) -> bool:
    """Whether a block finds again what it was given and what it reads: none of it is changed in place from then on."""
    if any(step.changed.get(number, -1) >= call.began for number in call.given):
        return False
    changed_inside = (n for n, moment in step.changed.items() if call.began <= moment < call.ended)
    return not any(_is_weight(step, number) for number in changed_inside)


def _is_weight(step: Step, number: int) -> bool:
    return step.allocations[number].operator == WEIGHT


def _first(allocations: Sequence[Allocation], moment: int) -> int:
    """The number of the first allocation from a moment on."""
    return bisect.bisect_left(allocations, moment, key=lambda allocation: allocation.born)


def _spans_in_backward(step: Step, paths: Collection[str]) -> dict[str, tuple[int, int]]:
    """From the first to the last allocation in backward for each of the modules and what is inside it."""
    known = set(paths)
    owner: dict[str, str | None] = {}
    spans: dict[str, tuple[int, int]] = {}
    for allocation in step.allocations[_first(step.allocations, step.forward_ended) :]:
        path = allocation.path
        if path not in owner:
            owner[path] = _nearest(path, known)
        block = owner[path]
        if block is not None:
            first, _ = spans.get(block, (allocation.born, 0))
            spans[block] = first, allocation.born + 1
    return spans


def _nearest(path: str, known: Collection[str]) -> str | None:
    """The module of `known` that a path is in, or None."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path or None
