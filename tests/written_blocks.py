"""Blocks with their activation written out in a method, in one way or another."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn


def author_swish(x):
    return x * torch.sigmoid(x)


class Block(nn.Module):
    beta = 1.0

    def __init__(self, width=16):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(width, 64), nn.Linear(64, width), nn.LayerNorm(width)
        self.function = F.gelu
        self.slope = 1.702


class CallsFunctional(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class CallsByLongName(Block):
    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.up(x)))


class CallsWithOptions(Block):
    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class BuiltOfSigmoid(Block):
    def forward(self, x):
        x = self.up(x)
        x = x * torch.sigmoid(x)
        return self.down(x)


class BuiltOfAttributes(Block):
    def forward(self, x):
        x = self.up(x)
        return self.down(x * (self.slope * x).sigmoid())


class CallsAttribute(Block):
    def forward(self, x):
        return self.down(self.function(self.up(x)))


class CallsPartial(Block):
    def __init__(self):
        super().__init__()
        self.function = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x):
        return self.down(self.function(self.up(x)))


class CallsAuthorsFunction(Block):
    def forward(self, x):
        return self.down(author_swish(self.up(x)))


class CallsInAnotherMethod(Block):
    def forward(self, x):
        return self.norm(self._feed(x))

    def _feed(self, x):
        return self.down(F.silu(self.up(x)))


class Decorated(Block):
    def twice(function):  # noqa: N805
        @functools.wraps(function)
        def wrapper(self, x):
            return function(self, function(self, x))

        return wrapper

    twice = staticmethod(twice)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class WithSuper(CallsInAnotherMethod):
    def forward(self, x):
        return super().forward(x) + self.down(F.gelu(self.up(x)))


FOUND = {
    CallsFunctional: ["forward:gelu"],
    CallsByLongName: ["forward:silu"],
    CallsWithOptions: ["forward:gelu_tanh"],
    BuiltOfSigmoid: ["forward:silu"],
    BuiltOfAttributes: ["forward:quick_gelu"],
    CallsAttribute: ["forward:gelu"],
    CallsPartial: ["forward:gelu_tanh"],
    CallsAuthorsFunction: ["forward:silu"],
    CallsInAnotherMethod: ["_feed:silu"],
    Decorated: ["forward:gelu"],
    WithSuper: ["forward:gelu", "_feed:silu"],
}


class CallsWhatIsOfAnother(Block):
    def forward(self, x):
        x = copy.copy(self.up(x))  # no part of any activation, whatever it does
        return self.down(x * torch.sigmoid(x))
