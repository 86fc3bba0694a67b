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

from invact.deriving.chains import all_kept_in_stead, is_mask, kept_in_stead, stands_for, without_views
from invact.deriving.derived_tensor import DerivedTensor
from invact.deriving.handles import Derived, Handle, Kept
from invact.deriving.masks import Bits
from invact.deriving.node_names import in_words, listed
from invact.deriving.saved_by_node import kept_by
from invact.ledger.entries import Entry, Key
from invact.ledger.ledger import Ledger
from invact.ledger.storages import dense_parts, storage_sizes
from invact.pytorch.backward import node_name
from invact.pytorch.circumstances import transforms_active
from invact.pytorch.tensors import StorageWeakRef, changes_in_place


@dataclass(frozen=True)
class _Note:
    handle: weakref.ref[Handle]
    tensor: Tensor  # on simulated tensors it takes no memory
    version: int
    node: str  # that made it; "" if no gradient flows through it
    path: str
    why_kept: str  # "" of what is not


class Journal:
    """Takes notes in the thread that opened it; the hooks find it there.

    Args:
        ledger: knows which module is running.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._notes: list[_Note] = []
        self._packers: weakref.WeakKeyDictionary[Handle, list[str]] = weakref.WeakKeyDictionary()
        self._made: weakref.WeakKeyDictionary[Handle, tuple[str, str | None, int]] = weakref.WeakKeyDictionary()
        self._kept_as: weakref.WeakKeyDictionary[Handle, _Note] = weakref.WeakKeyDictionary()
        # What is kept in another's stead and takes no bytes that stock does not keep; see `derived`.
        self._free: weakref.WeakSet[Handle] = weakref.WeakSet()
        # By storage and how often that was changed, the module whose output it is. While there is a weak reference, no
        # other storage gets the identity.
        self._outputs: dict[tuple[Key, int], str] = {}
        self._identities: list[StorageWeakRef] = []

    @contextmanager
    def open(self) -> Iterator[Journal]:
        _THREAD.journal = self
        try:
            with self._ledger.outputs_told(self._module_gave):
                yield self
        finally:
            _THREAD.journal = None

    # --- what the hooks tell ---

    def note(self, tensor: Tensor, handle: Handle, why_kept: str = "") -> None:
        """A tensor was about to be kept, and this is kept in its stead."""
        path, version = self._ledger.running(), changes_in_place(tensor)
        node = tensor.grad_fn
        alone = tensor.detach()  # the user's own may hold what it was given
        note = _Note(weakref.ref(handle), alone, version, "" if node is None else node_name(node), path, why_kept)
        self._notes.append(note)
        self._packers.setdefault(handle, []).append(path)
        self._kept_as.setdefault(handle, note)

    def _module_gave(self, path: str, args: Any, output: Any) -> None:
        """The innermost module is told of first, and what it gave is its, unless it only hands it on."""
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(first, Tensor) or transforms_active():  # whose tensors have no memory to tell them by
            return
        version = changes_in_place(first)
        if not version and args and first is args[0]:
            return
        for part in dense_parts(first):
            reference = StorageWeakRef(part.untyped_storage())
            if self._outputs.setdefault((reference.cdata, version), path) == path:
                self._identities.append(reference)

    def recipe(self, handle: Handle, node: Any, number: int) -> None:
        """A recipe was found for an output of `node`."""
        metadata = node._input_metadata[number]
        nbytes = math.prod(metadata.shape) * metadata.dtype.itemsize
        self._made[handle] = (node_name(node), self._path_of(node), nbytes)

    def _path_of(self, node: Any) -> str | None:
        """The module that ran the operator, told by who was running when it kept its own operands; or None."""
        common: set[str] | None = None
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                kept = kept_by(node, name.removeprefix("_raw_saved_"))
                if isinstance(kept, Handle) and (paths := self._packers.get(kept)):
                    common = set(paths) if common is None else (common & set(paths) or common)
        return next(iter(common)) if common and len(common) == 1 else None

    # --- what is read afterwards ---

    def stock_entries(self) -> list[Entry]:
        """What autograd would have kept without us, while the forward's result is alive."""
        alive = ((note.tensor, note.path) for note in self._notes if note.handle() is not None)
        return self._ledger.entries(alive)

    def derived(self) -> list[DerivedTensor]:
        """The tensors that are not kept, in the order in which they were first wanted."""
        handles = [note.handle() for note in self._notes]
        copied = {handle.beside for handle in handles if isinstance(handle, Kept) and handle.beside is not None}
        wanted: dict[Handle, list[_Note]] = {}
        asked: dict[Handle, set[Key]] = {}  # what stock keeps, by what is kept in its stead
        kept: set[Key] = set()
        own: set[Key] = set()
        for note, handle in zip(self._notes, handles, strict=True):
            if handle is None:
                continue
            base = without_views(handle)
            keys = storage_sizes(note.tensor).keys()
            if not isinstance(base, Kept) or base in copied:
                wanted.setdefault(base, []).append(note)
                continue
            kept |= keys
            if base.stands_for_another:
                asked.setdefault(base, set()).update(keys)
            else:
                own |= keys
        self._free = weakref.WeakSet([*copied, *(base for base, keys in asked.items() if not keys <= own)])
        counted: set[Key] = set(kept)
        steps = set(wanted)  # a step counts to the first tensor that needs it, but to itself if it is one
        return [self._told(handle, notes, counted, steps) for handle, notes in wanted.items()]

    def why_kept(self) -> dict[Key, str]:
        """By storage, why what is kept was not derived."""
        found: dict[Key, str] = {}
        for note in self._notes:
            if note.handle() is not None and note.why_kept:
                for key in storage_sizes(note.tensor):
                    found.setdefault(key, note.why_kept)
        return found

    def read(self) -> set[Key]:
        """The storages that recipes read: who no longer keeps one of these makes others keep it."""
        handles = [note.handle() for note in self._notes]
        bases = {without_views(handle) for handle in handles if handle is not None}
        leaves = [leaf for base in bases for leaf in self._read(base)]
        tensors = [tensor for leaf in leaves if (tensor := self._tensor(leaf)) is not None]
        return {key for tensor in tensors for key in storage_sizes(tensor)}

    def _told(self, handle: Handle, notes: list[_Note], counted: set[Key], steps: set[Handle]) -> DerivedTensor:
        sizes = {key: size for note in notes for key, size in storage_sizes(note.tensor).items()}
        saved = sum(size for key, size in sizes.items() if key not in counted)
        counted.update(sizes)
        keepers = list(dict.fromkeys(note.path for note in notes))
        if isinstance(handle, Bits):
            nbytes = handle.shape.numel()
            packed = -(-nbytes // 8)
            what = f"a mask in {self._ledger.label(keepers[0])}"
            why = "kept in bits instead of bytes"
            return DerivedTensor(what, keepers[0], keepers[0], why, saved - packed, nbytes + packed, len(keepers))
        node, path = notes[0].node, None
        if isinstance(handle, Derived):
            node, path, _ = self._made[handle]
            taken = {source for source in all_kept_in_stead(handle) if source not in self._free} - steps
            saved -= sum(self._nbytes(source) for source in taken)
            steps.update(taken)
        what = in_words(node, notes[0].tensor.dtype)
        output_of = self._output_of(notes[0])
        if output_of is not None:
            path, what = output_of, f"{self._ledger.label(output_of)}'s output"
        elif path is not None:
            what += f" in {self._ledger.label(path)}"
        else:
            path = keepers[0]
            what += f" for {self._ledger.label(path)}"
        moved = self._moved(handle, steps) + self._own_step(handle)
        reason = self._reason(handle) if isinstance(handle, Derived) else "a copy of it is kept anyway"
        return DerivedTensor(what, keepers[0], path, reason, saved, moved, len(keepers))

    def _output_of(self, note: _Note) -> str | None:
        """The path of the module whose output it is, or None."""
        paths = (self._outputs.get((key, note.version)) for key in storage_sizes(note.tensor))
        return next((path for path in paths if path is not None), None)

    def _reason(self, handle: Derived) -> str:
        """What it is made again from, leaving out what is small beside the rest, such as statistics."""
        if any(source not in self._free for source in kept_in_stead(handle)):
            return "kept smaller, as what it is made of"
        read = dict.fromkeys(self._read(handle))
        large = max((self._nbytes(leaf) for leaf in read if isinstance(leaf, Kept)), default=0) / 16
        words = [self._leaf(leaf) for leaf in read if is_mask(leaf) or self._nbytes(leaf) >= large]
        steps = f", in {handle.steps} steps" if handle.steps > 1 else ""
        return f"made again from {listed(list(dict.fromkeys(words)))}{steps}" if words else "made again from weights"

    def _read(self, handle: Handle) -> Iterator[Handle]:
        """What is kept of what a recipe reads, weights aside."""
        for source in map(without_views, handle.sources if isinstance(handle, Derived) else ()):
            if isinstance(source, Derived):
                yield from self._read(source)
            elif not self._ledger.is_weight(self._tensor(source)):
                yield source

    def _leaf(self, handle: Handle) -> str:
        """A tensor that is kept, in words: by its module's name in the model, which is the same in every layer."""
        if is_mask(handle):
            return "a mask"
        note = self._kept_as.get(handle)
        if note is None:
            tensor = self._tensor(handle)
            kind = "tensor" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} tensor"
            return f"a {kind} kept in its stead"
        path = self._output_of(note)
        if path is None:
            return in_words(note.node, note.tensor.dtype)
        name = path.rpartition(".")[2]
        return f"{self._ledger.label(path) if not name or name.isdigit() else name}'s output"

    def _tensor(self, handle: Handle) -> Tensor | None:
        data = getattr(handle, "data", None)
        tensor = data if isinstance(data, Tensor) else getattr(data, "tensor", None)  # inside the ledger's hooks
        return tensor if isinstance(tensor, Tensor) else None

    def _nbytes(self, handle: Handle) -> int:
        if handle in self._made:
            return self._made[handle][2]
        tensor = self._tensor(handle)
        return tensor.numel() * tensor.element_size() if tensor is not None else 0

    def _moved(self, handle: Handle, counted: set[Handle]) -> int:
        """By the steps on the way to a tensor that are not counted yet."""
        moved = 0
        for source in map(stands_for, handle.sources if isinstance(handle, Derived) else ()):
            moved += self._moved(source, counted)
            if source not in counted:
                counted.add(source)
                moved += self._own_step(source)
        return moved

    def _own_step(self, handle: Handle) -> int:
        if not isinstance(handle, Derived) or not handle.moves:
            return 0
        return self._nbytes(handle) + sum(self._nbytes(source) for source in handle.sources)


_THREAD = threading.local()


def journal_here() -> Journal | None:
    """The journal that is open in this thread."""
    return getattr(_THREAD, "journal", None)
