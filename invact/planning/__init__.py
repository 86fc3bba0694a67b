"""Walk a model, probe it, and decide what is inverted, derived, fused or kept, and why.

`plans.decide` is the way through: `places` (a walk), `first_pass`, `deciding` (functions over records, with `keepers`),
`changes` that are applied, and `reporting` what comes of it. `options` is what was asked for, `fusing` chooses norms,
and `by_layer` counts by layer.
"""

from invact.planning.plans import Decided, decide, decide_for_device, plan

__all__ = ["Decided", "decide", "decide_for_device", "plan"]
