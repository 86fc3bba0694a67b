"""What fits: a whole training step simulated, its highest point, and the fewest checkpointed blocks that meet a budget.

`lifetimes` follows storages, `simulated_training` takes a `step`, `optimizers` says what they hold, `blocks` finds what
may be checkpointed, `recomputing` foresees what that changes, `choosing` chooses, `batches` tells the largest batch.
"""
