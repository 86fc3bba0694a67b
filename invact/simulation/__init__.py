"""The circumstances of training on simulated tensors: device, autocast, attention, checkpointed regions, time."""

from invact.simulation.setting import Setting

__all__ = ["Setting"]
