"""Walk a model, probe it, and decide what is inverted, derived, fused or kept, and why.

`plans.decide` is the way through, from a model to what is to be swapped in it.
"""

from invact.planning.plans import Decided, decide, decide_for_device, plan

__all__ = ["Decided", "decide", "decide_for_device", "plan"]
