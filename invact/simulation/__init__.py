"""The circumstances of training on simulated tensors: device, autocast, attention, checkpointed regions, time.

`setting` is what is imitated, `simulated_model` a model on such tensors, `simulated_tensors` the mode in which they are
made, and `leftovers` finds who holds on to one; the others imitate one thing each. `time_limit` ends what does not end.
"""

from invact.simulation.setting import Setting

__all__ = ["Setting"]
