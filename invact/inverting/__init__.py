"""What runs in an activation's place: its output is kept for backward, or a few bits, instead of its input.

`autograd_functions` keeps the output, with gradients that are exact as far as it tells; `few_bits` keeps a few bits,
with approximate ones. `invact.functional` and `invact.nn` are the former under the names of PyTorch.
"""
