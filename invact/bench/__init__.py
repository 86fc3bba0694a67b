"""Activations and whole training steps timed, in turns with stock PyTorch and what others have published.

`contenders` and `ways` are what is timed, `kernels` and `steps` time it, `running` is one run of `invact bench`,
`records`, `tables` and `result` are what comes out. The trial and benchmarks/card use the same `timing` and `stepper`.
"""
