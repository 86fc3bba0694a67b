"""Everything that Python can reach from a model, noted before a forward pass and put back after it.

`snapshot` walks and puts back, `noted_*` is what is noted of one object, by its kind; `kinds` and `libraries` say what
an object is and whose.
"""

from invact.snapshot.snapshot import as_it_was

__all__ = ["as_it_was"]
