"""Models of two layers with an activation between them; the docstring of each is what is said of its site, and why."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two layers with an activation between them; each case below says what else happens to its input and output."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)
        self.act, self.norm, self.conv = nn.GELU(), nn.LayerNorm(64), nn.Conv1d(4, 4, 3)
        self.drop = nn.Dropout(0.1)


class LinearNext(Block):
    """Linear keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class FrozenNext(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        self.down.requires_grad_(False)
        return self.down(self.act(self.up(x)))


class NormNext(Block):
    """LayerNorm keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.down(self.norm(self.act(self.up(x))))


class ConvolutionNext(Block):
    """Conv1d keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.conv(self.act(self.up(x)))


class FrozenConvolutionNext(Block):
    """Conv1d keeps its output anyway, so its input can go"""  # unlike Linear, which knows that it need not

    def forward(self, x):
        self.conv.requires_grad_(False)
        return self.conv(self.act(self.up(x)))


class AveragePoolingNext(Block):
    """AvgPool2d keeps its output anyway, so its input can go"""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        return self.pool(self.act(self.up(x)))


class MaximumPoolingNext(Block):
    """MaxPool2d keeps its output anyway, so its input can go"""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.act(self.up(x)))


class MeanNext(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        return self.act(self.up(x)).mean(1)


class ResidualAdded(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        return self.gate(x) + self.act(self.up(x))


class ResidualAddedThenKept(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        return self.down(self.gate(x) + self.act(self.up(x)))


class SwiGlu(Block):
    """SwiGlu keeps its output anyway, so its input can go"""

    def __init__(self):
        super().__init__()
        self.act = nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class GeGlu(Block):
    """GeGlu keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class GeGluOfHalves(Block):
    """its output is made again from its input: GeGluOfHalves keeps its input anyway"""

    def forward(self, x):
        value, gate = self.up(x).chunk(2, dim=-1)  # two views of one memory, which the product keeps
        return (value * self.act(gate)).sum(-1)


class InputKept(Block):
    """its output is made again from its input: Linear keeps its input anyway"""

    def forward(self, x):
        x = self.up(x)
        return self.down(self.act(x)) + self.down(x)


class ChangedLater(Block):
    """its output is changed in place later"""

    def forward(self, x):
        return self.down(self.act(self.up(x)).mul_(2))


class CopiedByAReshape(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        y = self.act(self.up(x))
        return F.linear(y.transpose(1, 2).reshape(-1, 4, 4, 4).flatten(2), self.down.weight[:, :16])


class ViewedByAReshape(Block):
    """Linear keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.down(self.act(self.up(x)).reshape(-1, 64))


class DroppedAndShared(Block):
    """nobody else keeps its output: one tensor would only take the place of another"""

    def forward(self, x):
        y = self.act(self.up(x))
        return self.down(self.drop(y) + y)


class UnderNoGrad(Block):
    """no gradient flows through it here"""

    def forward(self, x):
        with torch.no_grad():
            y = self.act(self.up(x))
        return self.down(y)


class UsedTwiceOnceKept(Block):
    """Linear keeps its output anyway, so its input can go"""

    def forward(self, x):
        return self.down(self.act(self.up(x))) + self.act(self.gate(x)).mean()


CASES = Block.__subclasses__()
