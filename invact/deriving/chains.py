"""What a handle comes to, through views and what it waited for, and what a recipe reads on all its way."""

from __future__ import annotations

from collections.abc import Iterator

from invact.deriving.handles import Awaited, Derived, Handle, Kept
from invact.deriving.masks import Bits, PackedMask


def stands_for(handle: Handle) -> Handle:
    """What a handle stands for by now, where it waited for something."""
    while True:
        if isinstance(handle, Kept) and handle.instead is not None:
            handle = handle.instead
        elif isinstance(handle, Awaited) and handle.target is not None:
            handle = handle.target
        else:
            return handle


def without_views(handle: Handle) -> Handle:
    """What a handle is a view of."""
    handle = stands_for(handle)
    while isinstance(handle, Derived) and not handle.moves:
        handle = stands_for(handle.sources[0])
    return handle


def is_mask(handle: Handle) -> bool:
    return isinstance(handle, Bits | PackedMask)


def kept_in_stead(handle: Derived) -> list[Kept]:
    """What is kept in its stead alone."""
    sources = (without_views(source) for source in handle.sources)
    return [source for source in sources if isinstance(source, Kept) and source.stands_for_another]


def all_kept_in_stead(handle: Handle) -> Iterator[Kept]:
    """What is kept in its stead, or in that of a step on the way to it."""
    if isinstance(handle, Derived):
        yield from kept_in_stead(handle)
        for source in map(without_views, handle.sources):
            yield from all_kept_in_stead(source)
