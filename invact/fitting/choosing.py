"""The fewest blocks whose checkpointing lets a training step fit a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from invact.amounts import format_bytes
from invact.arguments import Inputs
from invact.fitting.blocks import repeated_blocks
from invact.fitting.optimizers import OptimizerLike
from invact.fitting.recomputing import Block, blocks_of, foreseen_peak, foreseen_step, in_order
from invact.fitting.step import STATES, TEMPORARY, WEIGHTS, Step, TakeStep, simulated_training
from invact.planning import Decided
from invact.pytorch_inside import tree_leaves
from invact.report import CheckpointedBlock

_CLEARLY = 1.01
"""A foreseen peak that is above the budget by more than this is not simulated: foreseen are most to a thousandth, and
none was seen to be off by more than this relative to its neighbours."""


MANY = 15_000
"""Operations of a step that take seconds to simulate; a Llama-3.1-8B has 9,000, with LoRA on all layers 20,000."""

_MUCH = 0.1
"""The share of a peak from which on its temporary tensors are told of."""


class DoesNotFitError(ValueError):
    """No choice of blocks lets the step fit; the message says what would."""


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
    if memory is not None and after.peak_bytes > memory:
        decided.checkpointed.clear()
        raise DoesNotFitError(_why_not(found, inputs, memory))
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
    gradients = sum(step.allocations[number].nbytes for number in step.gradients)
    fixed = gradients + sum(kinds.get(kind, 0) for kind in (WEIGHTS, STATES))
    checkpointed = (
        f"with all of its {blocks} blocks checkpointed" if blocks else "and it has no blocks that could be checkpointed"
    )
    words = [
        f"A step takes {format_bytes(step.peak_bytes)} at the least, {checkpointed}, and {format_bytes(memory)} were "
        f"given. Of that, {format_bytes(fixed)} are weights, gradients and optimizer states, whatever the batch."
    ]
    if step.is_at_the_turn and kinds.get(TEMPORARY, 0) > _MUCH * step.peak_bytes:
        words.append(
            f"It is highest {step.where(step.highest)}, where {format_bytes(kinds[TEMPORARY])} are temporary: of a "
            "language model's loss that can be had in chunks (TRL's SFTTrainer, Liger Kernel, cut-cross-entropy)."
        )
    if fixed >= memory:
        words.append(
            "Train fewer parameters, as with LoRA (invact patch --lora-rank 16, --quantize 4bit), or take an optimizer "
            "that holds less, such as adamw-8bit or adafactor."
        )
        return " ".join(words)
    batch = next((t.shape[0] for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1)
    fits = int(batch * (memory - fixed) / max(1, step.peak_bytes - fixed))
    words.append(
        f"By these figures a batch of {fits} instead of {batch} would fit."
        if fits
        else "By these figures not even one sample would fit: shorten it, or train fewer parameters, as with LoRA."
    )
    return " ".join(words)
