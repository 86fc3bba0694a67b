"""Walk a model, probe it, and decide what is inverted, derived, fused or kept, and why.

`plans.decide` is the way through: `walking`, `first_pass`, `deciding` (functions over records, with `keepers`),
`changes` that are applied, and `telling` what comes of it. `options` is what was asked for.
"""

from invact.planning.plans import Decided, decide, decide_for_device, plan

__all__ = ["Decided", "decide", "decide_for_device", "plan"]
