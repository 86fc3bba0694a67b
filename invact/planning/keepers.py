"""Who keeps which storage for backward, and how large each is: what a decision is made from, and what it changes."""

from __future__ import annotations

from collections.abc import Iterable

from invact.ledger.entries import Entry, Key


class Keepers:
    """The storages that a pass kept, by the paths of the modules that keep them.

    Attributes:
        sizes: bytes of each storage, also of one that nobody keeps any more.
        by_key: the paths that keep it; a storage that nobody keeps is not there.

    Example:
        >>> import torch
        >>> from invact.ledger.ledger import Ledger
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
        >>> with Ledger(model) as ledger:
        ...     y = model(torch.ones(4, 8))
        >>> keepers = Keepers(ledger.entries())
        >>> [(keepers.sizes[key], keepers.besides("1", {key})) for key in keepers.of("1")]
        [(128, set())]
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.sizes: dict[Key, int] = {}
        self.by_key: dict[Key, set[str]] = {}
        self._casts: dict[Key, list[Entry]] = {}
        for entry in entries:
            self.sizes[entry.key] = entry.nbytes
            self.by_key.setdefault(entry.key, set()).add(entry.path)
            if entry.cast_of is not None:
                self._casts.setdefault(entry.cast_of, []).append(entry)

    def copy(self) -> Keepers:
        twin = Keepers(())
        twin.sizes, twin._casts = dict(self.sizes), self._casts
        twin.by_key = {key: set(keepers) for key, keepers in self.by_key.items()}
        return twin

    def of(self, path: str) -> set[Key]:
        """The storages that `path` keeps, alone or with others."""
        return {key for key, keepers in self.by_key.items() if path in keepers}

    def alone(self, path: str) -> set[Key]:
        """The storages that nobody but `path` keeps."""
        return {key for key, keepers in self.by_key.items() if keepers == {path}}

    def besides(self, path: str, keys: Iterable[Key]) -> set[str]:
        """Who besides `path` keeps any of `keys`."""
        return {keeper for key in keys for keeper in self.by_key.get(key, ())} - {path}

    def cast(self, key: Key, nbytes: int) -> Key | None:
        """The cast of a storage that is kept in its stead and is of this size, if there is one."""
        return next((entry.key for entry in self._casts.get(key, []) if entry.nbytes == nbytes), None)

    def keep(self, path: str, key: Key, nbytes: int) -> None:
        """From here on `path` keeps this storage as well."""
        self.by_key.setdefault(key, set()).add(path)
        self.sizes.setdefault(key, nbytes)

    def release(self, path: str) -> None:
        """From here on `path` keeps nothing; what it kept is kept only if others do."""
        for keepers in self.by_key.values():
            keepers.discard(path)
        self.by_key = {key: keepers for key, keepers in self.by_key.items() if keepers}
