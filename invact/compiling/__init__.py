"""torch.compile: a backend whose steps keep less, and what a compiled step keeps.

Its partitioner is told to make again whatever is no matrix product; see `invact.compiling.inductor`.
"""

from invact.compiling.inductor import backend

__all__ = ["backend"]
