"""Which batch fits a GPU: parameters, gradients, optimiser states, and the ledger's count at two batch sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from invact.amounts import format_bytes
from invact.arguments import Inputs
from invact.checkpointing import can_checkpoint, checkpointed
from invact.planning import Decided
from invact.probing import Observation, observe
from invact.simulation import Setting

STATES = {"adamw": 2, "momentum": 1, "sgd": 0}
"""How many tensors an optimiser keeps of the size and dtype of every parameter."""

# Two sizes give the line. Not 1: batch norm refuses a single sample.
_BATCHES = (2, 4)

_IN_WORDS = {
    "baseline": "as it is",
    "invact": "with invact",
    "checkpointing": "with checkpointing",
    "invact+checkpointing": "with both",
}


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of a training step, linear in the batch."""

    constant: int
    per_sample: int

    def bytes_at(self, batch_size: int) -> int:
        return self.constant + batch_size * self.per_sample

    def largest_batch(self, memory: int) -> int:
        """0 if not even one sample fits."""
        return max(0, (memory - self.constant) // max(1, self.per_sample))


@dataclass(frozen=True)
class Fit:
    """What fits in the memory of one GPU, predicted.

    Attributes:
        memory_bytes: of the GPU, all of it.
        optimizer: a key of `STATES`.
        needs: by way of training: "baseline", "invact", "checkpointing", "invact+checkpointing"; the last two
            only for models that can be checkpointed.
        target_batch: the batch that is to fit, or None.
    """

    memory_bytes: int
    optimizer: str
    needs: dict[str, Need]
    target_batch: int | None = None

    @property
    def largest_batch(self) -> dict[str, int]:
        return {way: need.largest_batch(self.memory_bytes) for way, need in self.needs.items()}

    @property
    def way_for_target(self) -> str | None:
        """The first way that takes the target batch, in the order of what it costs; None if there is none."""
        if self.target_batch is None:
            return None
        return next((way for way, batch in self.largest_batch.items() if batch >= self.target_batch), None)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest_batch": self.largest_batch, "way_for_target": self.way_for_target}

    def __str__(self) -> str:
        batches = ", ".join(f"{batch} {_IN_WORDS[way]}" for way, batch in self.largest_batch.items())
        lines = [f"Largest batch in {format_bytes(self.memory_bytes)} with {self.optimizer}: {batches}."]
        if self.target_batch is not None:
            lines.append(self._target_in_words())
        lines.append(
            "Predicted from the count of what a step allocates, within 1% on an H200. There PyTorch's allocator "
            "reserved a tenth more: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True is against that."
        )
        return "\n".join(lines)

    def _target_in_words(self) -> str:
        way, target = self.way_for_target, self.target_batch or 0
        if way is None:
            smallest = min(need.bytes_at(target) for need in self.needs.values())
            return f"Batch {target}: nothing here makes it fit; it takes {format_bytes(smallest)} at least."
        remedy = {
            "baseline": "fits as it is, nothing needed",
            "invact": "fits with invact alone",
            "checkpointing": "needs checkpointing; invact alone is not enough",
            "invact+checkpointing": "needs both invact and checkpointing",
        }[way]
        return f"Batch {target}: {remedy} ({format_bytes(self.needs[way].bytes_at(target))})."


def needs(
    model: nn.Module,
    inputs_of: Callable[[int], Inputs],
    setting: Setting,
    decided: Decided,
    *,
    optimizer: str = "adamw",
) -> dict[str, Need]:
    """What a training step needs at its peak, by way of training.

    Resident are parameters, gradients and optimiser states. The peak is taken at the start of backward: all that
    the ledger counts is kept, and two tensors as large as the largest of it are in work, the gradient that comes
    in and the one that goes out. Under checkpointing it may come later as well, when a region has been run anew, which
    then keeps what it keeps, with two tensors as large as the largest of the region in work: the logits are gone then.

    Args:
        model: on any device or on meta; what is checkpointed already is so in every way, and stays so afterwards.
        inputs_of: makes the model's inputs, best with labels, for a batch size.
        decided: what invact does to the model.
        optimizer: a key of `STATES`.
    """
    resident = resident_bytes(model, optimizer)
    found = _needs_as_it_is(model, inputs_of, setting, resident)
    swaps = decided.apply(model)
    try:
        patched = _needs_as_it_is(model, inputs_of, setting, resident)
    finally:
        swaps.undo()
    found |= {_with_invact(way): need for way, need in patched.items()}
    return {way: found[way] for way in _IN_WORDS if way in found}


def _with_invact(way: str) -> str:
    return "invact" if way == "baseline" else f"invact+{way}"


def _needs_as_it_is(
    model: nn.Module, inputs_of: Callable[[int], Inputs], setting: Setting, resident: int
) -> dict[str, Need]:
    """Without checkpointing and, if the model can, with it."""
    found = {"baseline": _need(model, inputs_of, setting, resident)}
    if can_checkpoint(model):
        with checkpointed(model):
            found["checkpointing"] = _need(model, inputs_of, setting, resident)
    return found


def _need(model: nn.Module, inputs_of: Callable[[int], Inputs], setting: Setting, resident: int) -> Need:
    closed = [observe(model, inputs_of(batch), setting) for batch in _BATCHES]
    opened = closed
    if any(observed.checkpoints for observed in closed):
        # Opened anew: some models keep less, such as no cache, when they are checkpointed.
        opened = [observe(model, inputs_of(batch), setting, checkpointing=False) for batch in _BATCHES]
    peaks = [_peak_bytes(model, *pair) for pair in zip(opened, closed, strict=True)]
    return _line(peaks, resident)


def _line(peaks: list[int], resident: int) -> Need:
    """Through the peaks at the two batch sizes."""
    (small, large), (at_small, at_large) = _BATCHES, peaks
    per_sample = -(-(at_large - at_small) // (large - small))
    return Need(resident + at_small - small * per_sample, per_sample)


def resident_bytes(model: nn.Module, optimizer: str) -> int:
    """Parameters, buffers, gradients and optimiser states; frozen parameters have only themselves."""
    parameters = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    trained = sum(nbytes for nbytes, requires_grad in parameters if requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return sum(nbytes for nbytes, _ in parameters) + buffers + trained * (1 + STATES[optimizer])


def _peak_bytes(model: nn.Module, opened: Observation, closed: Observation) -> int:
    """Activations and gradients of activations at the peak; autocast's copies of weights among them.

    Args:
        opened: with checkpointed regions run as ordinary code.
        closed: as it is trained; for a model without checkpointing, the same observation.
    """
    kept = closed.memory.total_bytes + closed.memory.weight_cast_bytes
    peaks = [2 * max((entry.nbytes for entry in opened.entries), default=0)]
    for root, nbytes in _region_bytes(model, opened, closed).items():
        inside = (entry.nbytes for entry in opened.entries if f"{entry.path}.".startswith(f"{root}."))
        peaks.append(nbytes + 2 * max(inside, default=0))
    return kept + max(peaks)


def _region_bytes(model: nn.Module, opened: Observation, closed: Observation) -> Counter[str]:
    """Bytes by checkpointed region: the outermost modules in which nothing is kept when they are checkpointed.

    The input of a region is put down to the region itself or, by libraries that call it from outside, to the
    module around it. The number of regions tells which; if neither, they are taken too large, not too small.
    """
    inside = _bytes_by_root(model, opened, closed, keeping_its_input=True)
    outside = _bytes_by_root(model, opened, closed, keeping_its_input=False)
    return outside if len(outside) == closed.checkpoints else inside


def _bytes_by_root(
    model: nn.Module, opened: Observation, closed: Observation, *, keeping_its_input: bool
) -> Counter[str]:
    keeping = set(closed.memory.by_module)
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)  # their children are called one by one
    called = {path for path, module in model.named_modules() if not isinstance(module, containers)}
    if not keeping_its_input:
        called -= keeping
    bytes_by_root: Counter[str] = Counter()
    for path, nbytes in opened.memory.by_module.items():
        freed = nbytes - closed.memory.by_module.get(path, 0)
        if freed > 0:
            roots = (root for root in _ancestors(path) if root in called and not _any_below(keeping, root))
            bytes_by_root[next(roots, path)] += freed
    return bytes_by_root


def _ancestors(path: str) -> Iterable[str]:
    """The paths of the modules around `path`, outermost first, and itself."""
    parts = path.split(".")
    return (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def _any_below(paths: Iterable[str], root: str) -> bool:
    return any(path.startswith(f"{root}.") for path in paths)
