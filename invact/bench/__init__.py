"""Activations and whole training steps timed, in turns with stock PyTorch and what others have published.

`invact bench` prints it; the trial times its steps with the same clock.
"""
