"""How a module is patched: it stays the object it is and gets a class of its own, a subclass of the one it had.

That class inverts or approximates an activation, or expressions in a method, runs a norm by one operator, derives what
autograd keeps, or checkpoints a block; it goes when the module is given the class back that it had.

What runs in the place of the stock code is one file each: `inversion`, `approximation`, `fused_norms`, `derived`, and
`checkpointed`. `swaps` puts them in, all or none, and takes them out.
"""

from invact.swapping.patched import Patched
from invact.swapping.swaps import Swaps, swap_in, swaps_in

__all__ = ["Patched", "Swaps", "swap_in", "swaps_in"]
