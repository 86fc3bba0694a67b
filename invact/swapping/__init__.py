"""How a module is patched: it stays the object it is and gets a class of its own, a subclass of the one it had.

That class inverts or approximates an activation, or expressions in a method, runs a norm by one operator, derives what
autograd keeps, or checkpoints a block; it goes when the module is given the class back that it had.

`patched` is the base of all such classes and `class_over` makes them; `activations`, `rewritten`, `fused_norms`,
`derived` and `checkpointed` make one kind each, of what `inversion` and `approximation` run. `swaps` puts them in, all
or none, and takes them out.
"""

from invact.swapping.patched import Patched
from invact.swapping.swaps import Swaps, swap_in, swaps_in

__all__ = ["Patched", "Swaps", "swap_in", "swaps_in"]
