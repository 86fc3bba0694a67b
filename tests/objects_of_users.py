"""Objects as models of users hold them: mappings that refuse, slots, frozen dataclasses."""

import dataclasses

from torch import nn


class Frozen(dict):
    def _refuse(self, *args, **kwargs):
        raise TypeError("frozen")

    __setitem__ = __delitem__ = update = clear = pop = popitem = setdefault = _refuse


class Slotted:
    __slots__ = ("empty", "value")

    def __init__(self):
        self.value = [1]


@dataclasses.dataclass(frozen=True)
class Settings:
    rate: float
    steps: list


def model_with(**attributes):
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    for name, value in attributes.items():
        object.__setattr__(model, name, value)
    return model
