"""Everything that Python can reach from a model, noted before a forward pass and put back after it."""

from invact.snapshot.snapshot import as_it_was

__all__ = ["as_it_was"]
