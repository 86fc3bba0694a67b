"""The fewest blocks whose checkpointing lets a training step fit a budget."""

from __future__ import annotations

import inspect
import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from invact.errors.checks import Inputs
from invact.fitting.blocks import repeated_blocks
from invact.fitting.optimizers import OptimizerLike
from invact.fitting.recomputing import Block, blocks_of, foreseen_peak, foreseen_step, in_order
from invact.fitting.simulated_training import TakeStep, simulated_training
from invact.fitting.step import GRADIENTS, STATES, TEMPORARY, WEIGHTS, Step
from invact.patchers import without_adapters
from invact.planning.plans import Decided
from invact.pytorch.containers import tree_leaves
from invact.report.amounts import format_bytes, in_words
from invact.report.records import CheckpointedBlock

_CLEARLY = 1.01
"""A foreseen peak that is above the budget by more than this is not simulated. Seen on the models of docs/fitting.md:
most are foreseen to a thousandth, and none was off by more than this relative to its neighbours."""

MANY = 15_000
"""Operations of a step that take seconds to simulate; chosen between what was counted: a Llama-3.1-8B has 9,000, with
LoRA on all layers 20,000."""

_MUCH = 0.1
"""The share of a peak from which on its temporary tensors are told of. Chosen: with less, chunks of the loss would not
make it fit."""


class DoesNotFitError(ValueError):
    """No choice of blocks lets the step fit; the message says what would.

    Attributes:
        least: the step as given, and as it takes the least.
    """

    def __init__(self, message: str, least: Fitted) -> None:
        super().__init__(message)
        self.least = least


@dataclass(frozen=True)
class Fitted:
    """A training step before and after.

    Attributes:
        before: the step as the model was given.
        patched: with all that was decided, and nothing checkpointed.
        after: with these blocks checkpointed.
        blocks: in the order of forward.
    """

    before: Step
    patched: Step
    after: Step
    blocks: list[Block]


def fit_in(
    decided: Decided,
    model: nn.Module,
    inputs: Inputs,
    *,
    optimizer: OptimizerLike = "adamw",
    memory: int | None = None,
    accumulating: bool = False,
    quick: bool = False,
) -> Fitted:
    """Simulates the step, checkpoints the fewest blocks with which it fits, and adds both to what was decided.

    Args:
        decided: what invact does to the model; afterwards it says which blocks to checkpoint, and its report what that
            comes to.
        model: on any device or on meta.
        inputs: those that were decided for, best with labels.
        optimizer: a name of `invact.fitting.optimizers.NAMES`, or one of the user's.
        memory: bytes for all of a step; None checkpoints nothing.
        accumulating: gradients of earlier batches are there all the time.
        quick: of a step of more than `MANY` operations, that with checkpointed blocks is foreseen and not simulated.

    Raises:
        DoesNotFitError: the step does not fit with all blocks checkpointed, or there are none; the report tells of that
            step then, and nothing is to be checkpointed.
        NotSimulatedError: the step does not run on simulated tensors.
    """
    found = _fitted(decided, model, inputs, optimizer, memory, accumulating, quick)
    decided.checkpointed[:] = [block.path for block in found.blocks]
    report, after = decided.report, found.after
    report.optimizer = optimizer if isinstance(optimizer, str) else type(optimizer).__name__
    report.peak_bytes_before, report.peak_bytes = found.before.peak_bytes, after.peak_bytes
    report.peak, report.peak_at = after.kinds_at(after.highest), after.where(after.highest)
    report.memory_bytes = memory or 0
    report.blocks = [CheckpointedBlock(block.path, block.bytes_won, block.share) for block in found.blocks]
    if found.blocks:
        report.bytes_after -= found.patched.kept_bytes - after.kept_bytes
        report.kept_by_class, report.remains, report.not_derived = {}, {}, {}
        report.notes.append(
            "what is checkpointed keeps nothing between forward and backward but what it was given; the bytes saved at "
            "its sites and tensors are those by which it keeps less while it is run once more."
        )
    if not after.from_its_loss and "labels" in inspect.signature(without_adapters(model).forward).parameters:
        report.notes.append(
            "the model was given no labels, with which it would compute its loss: backward begins at the sum of what "
            "it gives, and the peak lacks what the loss takes."
        )
    if memory is not None and after.peak_bytes > memory:
        decided.checkpointed.clear()
        raise DoesNotFitError(_why_not(found, inputs, memory), found)
    return found


def _fitted(
    decided: Decided,
    model: nn.Module,
    inputs: Inputs,
    optimizer: OptimizerLike,
    memory: int | None,
    accumulating: bool,
    quick: bool,
) -> Fitted:
    paths = repeated_blocks(model) if memory is not None else []
    with simulated_training(model, inputs, decided.setting, optimizer, accumulating=accumulating) as take_step:
        before = take_step()
        with decided.applied(model):
            patched = take_step(with_work=bool(paths))
        if memory is None or patched.peak_bytes <= memory:
            return Fitted(before, patched, patched, [])
        blocks = in_order(blocks_of(patched, paths))
        simulates = not (quick and patched.backward_ended > MANY)
        search = _Search(model, decided, take_step, patched, blocks, memory, simulates)
        return Fitted(before, patched, *search.fewest())


class _Search:
    """Among the first so many of some blocks; simulates where what is foreseen does not tell."""

    def __init__(
        self,
        model: nn.Module,
        decided: Decided,
        take_step: TakeStep,
        patched: Step,
        blocks: Sequence[Block],
        memory: int,
        simulates: bool,
    ) -> None:
        self._model, self._decided, self._take_step = model, decided, take_step
        self._patched, self._blocks, self._memory, self._simulates = patched, blocks, memory, simulates
        self._off = 0  # how far the last foreseen peak was below the simulated one

    def fewest(self) -> tuple[Step, list[Block]]:
        """The step with the fewest blocks checkpointed that fits, or with all, and these in the order of forward."""
        most = len(self._blocks)
        count = self._foreseen_count(1)
        step = self._simulated(self._blocks[:count])
        while step.peak_bytes > self._memory and count < most:
            count = self._foreseen_count(count + 1)
            step = self._simulated(self._blocks[:count])
        chosen = list(self._blocks[:count])
        while step.peak_bytes <= self._memory and (fewer := self._without_one(chosen)) is not None:
            step, chosen = fewer
        return step, sorted(chosen, key=lambda block: block.call.began)

    def _foreseen_count(self, least: int) -> int:
        """The smallest number of blocks, of at least so many, with which the step will probably fit, or all."""
        most = len(self._blocks)
        found = bisect_left(range(most + 1), True, lo=min(least, most), key=lambda n: self._may_fit(self._blocks[:n]))
        return min(found, most)

    def _may_fit(self, chosen: Sequence[Block], margin: float = 1.0) -> bool:
        return foreseen_peak(self._patched, chosen) + self._off <= self._memory * margin

    def _without_one(self, chosen: list[Block]) -> tuple[Step, list[Block]] | None:
        """The step with one block fewer, if that fits: the last that was added, or another that is dispensable now."""
        for dispensable in reversed(chosen):
            others = [block for block in chosen if block is not dispensable]
            last = dispensable is chosen[-1]
            if self._may_fit(others, _CLEARLY if last else 1.0):
                step = self._simulated(others)
                if step.peak_bytes <= self._memory:
                    return step, others
        return None

    def _simulated(self, chosen: Sequence[Block]) -> Step:
        if not self._simulates:
            return foreseen_step(self._patched, chosen)
        self._decided.checkpointed[:] = [block.path for block in chosen]
        try:
            with self._decided.applied(self._model):
                step = self._take_step()
        finally:
            self._decided.checkpointed.clear()
        self._off = step.peak_bytes - foreseen_peak(self._patched, chosen)
        return step


def _why_not(found: Fitted, inputs: Inputs, memory: int) -> str:
    """What does not fit, and what would."""
    step, blocks = found.after, len(found.blocks)
    kinds = step.kinds_at(step.highest)
    none = "and it has no blocks that could be checkpointed"
    checkpointed = f"with all of its {blocks} blocks checkpointed" if blocks else none
    words = [
        f"A step takes {format_bytes(step.peak_bytes)} at the least, {checkpointed}, and {format_bytes(memory)} were "
        f"given. It is highest {step.where(step.highest)}: {in_words(kinds)}."
    ]
    if step.is_at_the_turn and kinds.get(TEMPORARY, 0) > _MUCH * step.peak_bytes:
        words.append(
            "What is temporary there is mostly a language model's loss, which can be had in chunks: TRL's SFTTrainer, "
            "Liger Kernel and cut-cross-entropy have one."
        )
    whatever_the_batch = step.resident + step.alive[step.backward_ended]
    fixed = sum(kinds.get(kind, 0) for kind in (WEIGHTS, STATES, GRADIENTS))
    if whatever_the_batch > memory:
        words.append(_of_the_optimizer(step, memory))
    elif fixed >= memory:
        words.append(_of_the_weights(step))
    else:
        batch = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1)
        fits = int(batch * _share_that_fits(step, memory))
        words.append(
            f"By these figures a batch of about {fits} instead of {batch} would fit."
            if fits
            else "By these figures not even one sample would fit; a shorter or smaller one might."
        )
    return " ".join(words)


def _share_that_fits(step: Step, memory: int) -> float:
    """Of the batch; at each moment all but weights, optimizer states and gradients is taken to shrink with it."""
    changes = [0] * (step.backward_ended + 2)
    for number in step.gradients:
        changes[step.allocations[number].born] += step.allocations[number].nbytes
    gradients = itertools.accumulate(changes)
    moments = zip(step.alive[: step.backward_ended], gradients, strict=False)
    shares = ((memory - step.resident - fixed) / (alive - fixed) for alive, fixed in moments if alive > fixed)
    return max(0.0, min(shares, default=1.0))


def _of_the_optimizer(step: Step, memory: int) -> str:
    """What would help where the optimizer's step does not fit, which is the same for every batch."""
    taken = f"The optimizer's step takes {format_bytes(step.resident + step.alive[step.backward_ended])}"
    if step.resident + step.gradient_bytes <= memory:
        return f"{taken} whatever the batch, {format_bytes(step.held.temporary)} of it temporary: adamw-fused has none."
    return f"{taken} whatever the batch. {_of_the_weights(step)}"


def _of_the_weights(step: Step) -> str:
    if 2 * step.gradient_bytes < step.weights:  # most of them are frozen
        return "Most of that are frozen weights: load them in 4 bits, as QLoRA does, or take a smaller model."
    return (
        "Train fewer parameters, as LoRA does, or take an optimizer that holds less, such as adamw-8bit or adafactor."
    )
