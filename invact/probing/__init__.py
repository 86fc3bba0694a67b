"""One forward pass of a model under the ledger, told as plain records; nothing of it is left in the model.

It imports nothing: what a probe may take is read here, and set here.
"""

TIME_LIMIT = 120.0
"""Seconds that one forward pass may take before it is stopped with an error; a plan takes one to four of them."""
