"""What is leaned on inside PyTorch: each private name, what for, and what breaks without.

A PyTorch that has renamed one is met where its file here is imported, with one sentence. No other file of invact names
anything private of PyTorch's, but `invact.compiling.compiler_inside` for its compiler; deriving and swapping read the
version counters and storages of tensors where they stand.
"""
