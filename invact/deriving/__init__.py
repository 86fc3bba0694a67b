"""Tensors that autograd would keep for backward are made again from others that it keeps anyway.

`handles` says what is kept in a tensor's stead and gives it back, `rules` how the output of each operator is made again,
`hooks` looks at each tensor that is about to be kept, and `placing` puts the hooks into a model.
"""
