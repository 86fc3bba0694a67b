"""What became of each tensor that stock autograd would have kept, written down while a plan is made."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from invact.deriving.handles import Awaited, Bits, Derived, Handle, Kept, kept_by
from invact.ledger import Entry, Key, Ledger, storage_sizes


@dataclass(frozen=True)
class DerivedTensor:
    """One tensor that is made again in backward instead of being kept.

    Attributes:
        what: the tensor in words, such as "LayerNorm's output".
        kept_by: dotted path of the module that would have kept it, the first of them.
        path: of the module in which it is made; `kept_by` where that can not be told.
        reason: from what it is made again, and who else would have kept it.
        bytes_saved: that are no longer kept.
        bytes_moved: read and written in backward to make it again, all steps together, however many ask for it.
    """

    what: str
    kept_by: str
    path: str
    reason: str
    bytes_saved: int
    bytes_moved: int


@dataclass(frozen=True)
class _Note:
    handle: weakref.ref[Handle]
    tensor: Tensor  # on simulated tensors it takes no memory
    path: str


class Journal:
    """Takes notes in the thread that opened it; the hooks find it there.

    Args:
        ledger: knows which module is running.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._notes: list[_Note] = []
        self._packers: weakref.WeakKeyDictionary[Handle, list[str]] = weakref.WeakKeyDictionary()
        self._made: weakref.WeakKeyDictionary[Handle, tuple[str, str, int]] = weakref.WeakKeyDictionary()

    @contextmanager
    def open(self) -> Iterator[Journal]:
        _THREAD.journal = self
        try:
            yield self
        finally:
            _THREAD.journal = None

    # --- what the hooks tell ---

    def note(self, tensor: Tensor, handle: Handle) -> None:
        """A tensor was about to be kept, and this is kept in its stead."""
        path = self._ledger.running()
        self._notes.append(_Note(weakref.ref(handle), tensor.detach(), path))
        self._packers.setdefault(handle, []).append(path)

    def recipe(self, handle: Handle, node: Any, number: int) -> None:
        """A recipe was found for an output of `node`."""
        metadata = node._input_metadata[number]
        nbytes = math.prod(metadata.shape) * metadata.dtype.itemsize
        self._made[handle] = (node.name(), self._path_of(node), nbytes)

    def _path_of(self, node: Any) -> str:
        """The module that ran the operator, told by who was running when it kept its own operands; or ""."""
        common: set[str] | None = None
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                kept = kept_by(node, name.removeprefix("_raw_saved_"))
                if isinstance(kept, Handle) and (paths := self._packers.get(kept)):
                    common = set(paths) if common is None else (common & set(paths) or common)
        return next(iter(common)) if common and len(common) == 1 else ""

    # --- what is read afterwards ---

    def stock_entries(self) -> list[Entry]:
        """What autograd would have kept without us, while the forward's result is alive."""
        alive = ((note.tensor, note.path) for note in self._notes if note.handle() is not None)
        return self._ledger.entries(alive)

    def derived(self) -> list[DerivedTensor]:
        """The tensors that are not kept, in the order in which they were first wanted."""
        wanted: dict[Handle, list[_Note]] = {}
        kept: set[Key] = set()
        for note in self._notes:
            handle = note.handle()
            if handle is None:
                continue
            base = _base(handle)
            if isinstance(base, Kept):
                kept |= storage_sizes(note.tensor).keys()
            else:
                wanted.setdefault(base, []).append(note)
        counted: set[Key] = set(kept)
        return [self._told(handle, notes, counted) for handle, notes in wanted.items()]

    def _told(self, handle: Handle, notes: list[_Note], counted: set[Key]) -> DerivedTensor:
        sizes = {key: size for note in notes for key, size in storage_sizes(note.tensor).items()}
        saved = sum(size for key, size in sizes.items() if key not in counted)
        counted |= sizes.keys()
        keepers = list(dict.fromkeys(note.path for note in notes))
        others = f"; {len(keepers) - 1} others would have kept it too" if len(keepers) > 1 else ""
        if isinstance(handle, Bits):
            nbytes = handle.shape.numel()
            why = f"a mask of {nbytes} bools is kept in bits{others}"
            return DerivedTensor("a mask", keepers[0], keepers[0], why, saved - -(-nbytes // 8), nbytes * 2)
        assert isinstance(handle, Derived)
        node, path, _ = self._made[handle]
        saved -= sum(self._nbytes(source) for source in _taken(handle) if source not in self._packers)
        reason = f"made again from {self._sources(handle)}{others}"
        return DerivedTensor(_in_words(node), keepers[0], path or keepers[0], reason, saved, self._moved(handle))

    def _sources(self, handle: Derived) -> str:
        """What it is made of, in words."""
        if _taken(handle):
            return "a smaller tensor that is kept in its stead"
        made = [self._made[source][0] for source in handle.sources if source in self._made]
        words = list(dict.fromkeys(_in_words(node) for node in made))
        return f"{' and '.join(words)}, in {handle.steps} steps" if words else "what its own operator keeps"

    def _nbytes(self, handle: Handle) -> int:
        if handle in self._made:
            return self._made[handle][2]
        data = getattr(handle, "data", None)
        tensor = data if isinstance(data, Tensor) else getattr(data, "tensor", None)
        return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0

    def _moved(self, handle: Handle | None) -> int:
        if isinstance(handle, Awaited) or (isinstance(handle, Kept) and handle.instead is not None):
            return self._moved(handle.target if isinstance(handle, Awaited) else handle.instead)
        if not isinstance(handle, Derived):
            return 0
        below = sum(self._moved(source) for source in handle.sources)
        if not handle.moves:
            return below
        return below + self._nbytes(handle) + sum(self._nbytes(source) for source in handle.sources)


_THREAD = threading.local()


def journal_here() -> Journal | None:
    """The journal that is open in this thread."""
    return getattr(_THREAD, "journal", None)


def _base(handle: Handle) -> Handle:
    """What a handle is a view of."""
    while True:
        if isinstance(handle, Kept) and handle.instead is not None:
            handle = handle.instead
        elif isinstance(handle, Derived) and not handle.moves:
            handle = handle.sources[0]
        elif isinstance(handle, Awaited) and handle.target is not None:
            handle = handle.target
        else:
            return handle


def _taken(handle: Derived) -> list[Kept]:
    """What is kept in its stead alone."""
    sources = (_base(source) for source in handle.sources)
    return [source for source in sources if isinstance(source, Kept) and source.stands_for_another]


_WORDS = {
    "NativeLayerNormBackward0": "LayerNorm's output",
    "FusedRmsNormBackward0": "RMSNorm's output",
    "NativeGroupNormBackward0": "GroupNorm's output",
    "NativeBatchNormBackward0": "BatchNorm's output",
    "CudnnBatchNormBackward0": "BatchNorm's output",
    "MiopenBatchNormBackward0": "BatchNorm's output",
    "NativeDropoutBackward0": "a dropped tensor",
    "ToCopyBackward0": "a cast",
    "CloneBackward0": "a copy",
    "MulBackward0": "a product",
    "DivBackward0": "a quotient",
    "AddBackward0": "a sum",
    "SubBackward0": "a difference",
    "CatBackward0": "a concatenation",
    "StackBackward0": "a concatenation",
    "GeluBackward0": "GELU's output",
    "SiluBackward0": "SiLU's output",
    "ReluBackward0": "ReLU's output",
}


def _in_words(node: str) -> str:
    return _WORDS.get(node) or f"{node.partition('Backward')[0]}'s output"
