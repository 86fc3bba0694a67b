"""Tensors that autograd would keep for backward are made again from others that it keeps anyway.

`handles` says what is kept in a tensor's stead and gives it back, `rules` how the output of each operator is made
again, `stead` which smaller tensor may be kept for one. `hooks` looks at each tensor that is about to be kept, and
`placing` says where in a model.
"""
