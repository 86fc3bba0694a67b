"""What autograd keeps for backward: every saved tensor down to its storage, and which module saved it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from invact.errors.own_errors import users_call
from invact.ledger.entries import Entry, Key, Memory
from invact.ledger.storages import dense_parts, storage_sizes
from invact.pytorch.modes import TorchDispatchMode
from invact.pytorch.operators import cast_operation, device_query
from invact.pytorch.tensors import StorageWeakRef


class _Kept:
    """One tensor packed for backward; alive as long as the autograd graph that packed it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Casts(TorchDispatchMode):
    """Remembers which storage a change of dtype was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[Key, tuple[StorageWeakRef, StorageWeakRef]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is device_query:  # as often as all operators together, and each mode below would be told of it
            return args[0].device
        out = users_call(func, *args, **(kwargs or {}))
        if func is cast_operation and out.dtype is not args[0].dtype:
            for copied, source in zip(dense_parts(out), dense_parts(args[0]), strict=False):
                copied_storage = copied.untyped_storage()
                # Weak references tell whether a storage still lives or its identity was given to another.
                references = StorageWeakRef(copied_storage), StorageWeakRef(source.untyped_storage())
                self._sources[references[0].cdata] = references
        return out

    def source(self, key: Key) -> Key | None:
        """The storage that `key` is a cast of, if both are alive, or None."""
        references = self._sources.get(key)
        if references is None or any(reference.expired() for reference in references):
            return None
        source: Key = references[1].cdata
        return source


class Ledger:
    """Counts what autograd keeps during the forward passes that run inside it.

    Known limits: not counted are tensors that a `torch.autograd.Function` keeps as attributes of its `ctx` instead of
    by `save_for_backward`, what other threads keep, and memory that operators only work with. A compiled model runs
    eagerly inside, for which there is `invact.ledger.kept_storages.KeptStorages`.

    Attributes:
        of_other_threads: paths of modules that another thread ran; what autograd keeps there is not counted.

    Args:
        model: whose modules are named, and whose parameters and buffers are left out of the count.
        weights: the tensors that stand for the parameters and buffers, if not the model's own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
        >>> with Ledger(model) as ledger:
        ...     y = model(torch.ones(4, 8, requires_grad=True))
        >>> ledger.memory().by_class
        {'Linear': 256, 'GELU': 128}
    """

    def __init__(self, model: nn.Module, weights: Iterable[Tensor] | None = None) -> None:
        self._model = model
        self._weights = list(weights if weights is not None else [*model.parameters(), *model.buffers()])
        self._weight_keys: set[Key] | None = None
        self._packed: list[tuple[weakref.ref[_Kept], str]] = []
        self._running: list[str] = []
        self._thread = threading.get_ident()
        self.of_other_threads: set[str] = set()
        self._labels = {path: type(module).__name__ for path, module in model.named_modules()}
        self._casts = _Casts()
        self._stack = ExitStack()

    def __enter__(self) -> Ledger:
        with ExitStack() as stack:
            stack.enter_context(module_hooks(self._model, self._enter_module, self._leave_module))
            stack.enter_context(self._casts)
            stack.enter_context(saved_tensors_hooks(self._pack, lambda kept: kept.tensor))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def entries(self, packed: Iterable[tuple[Tensor, str]] | None = None) -> list[Entry]:
        """Every storage kept now, once per module that keeps it, in the order of first packing.

        Args:
            packed: tensors and who keeps them, if not those that the ledger has seen itself.
        """
        weights = {key for tensor in self._weights for key in storage_sizes(tensor)}
        found: dict[tuple[Key, str], Entry] = {}
        for tensor, path in self._alive() if packed is None else packed:
            for key, nbytes in storage_sizes(tensor).items():
                if key not in weights:
                    found.setdefault((key, path), Entry(key, nbytes, path, self._casts.source(key)))
        return list(found.values())

    def _alive(self) -> Iterator[tuple[Tensor, str]]:
        for reference, path in self._packed:
            kept = reference()
            if kept is not None:  # else its part of the graph is gone: nobody can run it backward
                yield kept.tensor, path

    def memory(self, entries: Iterable[Entry] | None = None) -> Memory:
        """The count as totals; call it while the forward's result is still alive."""
        weights = {key for tensor in self._weights for key in storage_sizes(tensor)}
        by_module: Counter[str] = Counter()
        by_class: Counter[str] = Counter()
        weight_casts = 0
        for entry in {entry.key: entry for entry in (self.entries() if entries is None else entries)}.values():
            if entry.cast_of in weights:
                weight_casts += entry.nbytes
            else:
                by_module[entry.path] += entry.nbytes
                by_class[self._labels[entry.path]] += entry.nbytes
        return Memory(by_module.total(), dict(by_module), dict(by_class), weight_casts)

    def running(self) -> str:
        """The path of the innermost module that is running."""
        return self._running[-1] if self._running else ""

    @contextmanager
    def named(self, path: str, label: str) -> Iterator[None]:
        """What is kept during the block is put down to `path`, as if it were a module of class `label`."""
        self._labels[path] = label
        self._enter_module(path)
        try:
            yield
        finally:
            self._leave_module(path)

    @contextmanager
    def outputs_told(self, tell: Callable[[str, Any, Any], None]) -> Iterator[None]:
        """During the block, `tell` is called with path, arguments and output of every module that ends."""

        def after(path: str, _module: nn.Module, args: Any, output: Any) -> None:
            if self.is_here():
                tell(path, args, output)

        with module_hooks(self._model, None, after):
            yield

    def is_weight(self, tensor: Tensor | None) -> bool:
        """Whether it is one of the model's parameters or buffers, or a view of one."""
        if tensor is None:
            return False
        if self._weight_keys is None:
            self._weight_keys = {key for weight in self._weights for key in storage_sizes(weight)}
        return not self._weight_keys.isdisjoint(storage_sizes(tensor))

    def is_here(self) -> bool:
        """Whether this is called in the thread that the ledger counts."""
        return threading.get_ident() == self._thread

    def label(self, path: str) -> str:
        """The class name of the module at `path`, or what `named` called it."""
        return self._labels[path]

    def _enter_module(self, path: str, *_: Any) -> None:
        if self.is_here():
            self._running.append(path)
        else:
            self.of_other_threads.add(path)

    def _leave_module(self, path: str, *_: Any) -> None:
        if self.is_here():
            self._running.pop()

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())
        self._packed.append((weakref.ref(kept), self.running()))
        return kept


@contextmanager
def module_hooks(
    model: nn.Module,
    before: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None] | None,
    after: Callable[[str, nn.Module, tuple[Any, ...], Any], None],
) -> Iterator[None]:
    """Calls `before` and `after` with the dotted path around the forward of every module of `model`."""
    with ExitStack() as stack:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # it takes no hooks from outside
                continue
            if before is not None:
                stack.callback(
                    module.register_forward_pre_hook(_bound(before, path), prepend=True, with_kwargs=True).remove
                )
            stack.callback(module.register_forward_hook(_bound(after, path), always_call=True).remove)
        yield


def _bound(hook: Callable[..., None], path: str) -> Callable[..., None]:
    def call(*args: Any) -> None:
        hook(path, *args)

    return call
