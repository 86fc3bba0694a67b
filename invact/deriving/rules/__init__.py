"""How the output of each operator is made again: a rule for each, registered under the name of its node in the graph.

A rule is given the node and looks for what the operator read: what the node itself keeps, under the names of
PyTorch's `derivatives.yaml`, or else what its producer gave. Every step rounds as it did in forward, so the gradients
are bit for bit those of stock PyTorch. None of them costs more than reading its operands and writing its output; none
sums over more than one dimension, or over what one group of a norm holds.

What autograd does not record cannot be made again: the number in `x + 1.0`, `1 - x`, `x.masked_fill(mask, 0.0)`,
`torch.where(mask, x, 0.0)` and `F.threshold`, and a constant tensor that is added. A norm's eps is read from the frame
of its function (`norm_settings`), a padding's number from the padded tensor (`padding`).

A new operator is one line in the file of its kind, and one case in tests/operator_cases.py. Whoever imports one
file of these has registered the rules of all.
"""

from invact.deriving.rules import (  # noqa: F401  (each registers its rules)
    casts_and_copies,
    dropout,
    images,
    norms,
    padding,
    pointwise,
    rearranging,
    softmax,
    sums,
    views,
)
