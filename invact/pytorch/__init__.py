"""What is leaned on inside PyTorch: each private name, what for, and what breaks without.

A PyTorch that has renamed one is met where its file here is imported, with one sentence. No other file of invact takes
anything private from PyTorch's modules, but `invact.compiling.compiler_inside` from its compiler's. Attributes that
objects have, such as a node's `_saved_self` or a tensor's `_version`, are read where they are needed.
"""
