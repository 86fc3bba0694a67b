"""One forward pass of a model under the ledger, told as plain records; nothing of it is left in the model."""

TIME_LIMIT = 120.0
"""Seconds that one forward pass may take before it is stopped with an error; a plan takes two or three of them."""

from invact.probing.probe import activation_memory, observe  # noqa: E402  (which read the limit here)

__all__ = ["TIME_LIMIT", "activation_memory", "observe"]
