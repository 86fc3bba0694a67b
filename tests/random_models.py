"""Models made up of layers and steps that hypothesis draws: activations, norms, gates, adapters, regions."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

# Rows of (3, 11, WIDTH) and images of (2, WIDTH, 4, 4) have just as many elements as it takes to be derived, and the
# halves of a value have too few.
WIDTH = 32

# --- activations as models write them -------------------------------------------------------------------


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


class WrittenGelu(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.gelu(self.layer(x))


class WrittenSwish(WrittenGelu):
    def forward(self, x):
        x = self.layer(x)
        return x * x.sigmoid()


class WrittenInPlace(WrittenGelu):
    def forward(self, x):
        return F.silu(self.layer(x), inplace=True)


class WrittenGate(WrittenGelu):
    def forward(self, x):
        return F.silu(self.layer(x)) * x


class WrittenOfTheInput(WrittenGelu):
    def forward(self, x):
        return self.layer(F.gelu(x, approximate="tanh")) + F.relu(x)


# --- norms, gates, adapters, regions --------------------------------------------------------------------


class NormInSteps(nn.Module):
    """As Hugging Face writes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class FrozenNorm1d(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class FrozenNorm2d(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class ChannelsLast(nn.Module):
    """A layer for rows, on images; one for channels, on rows."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if x.dim() == 3:
            return self.layer(x.transpose(1, 2)).transpose(1, 2)
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gate(nn.Module):
    """`of` gate and up, from one layer or two."""

    def __init__(self, images, of, chunked=False):
        super().__init__()
        self.dim, self.of, self.act = 1 if images else -1, of, nn.GELU()
        self.down = linear(images)
        self.both = wide(images) if chunked else None
        self.gate, self.up = (None, None) if chunked else (linear(images), linear(images, bias=False))

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=self.dim) if self.gate is None else (self.gate(x), self.up(x))
        return self.down(self.of(self, gate, up))


def clamped(self, gate, up):
    gate, up = gate.clamp(max=0.7), up.clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


class Adapter(nn.Module):
    """A frozen layer with a branch of low rank beside it, in 32 bits as PEFT keeps it."""

    def __init__(self, images, dropout):
        super().__init__()
        self.layer, self.drop = linear(images).requires_grad_(False), nn.Dropout(dropout)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, x):
        y = self.layer(x)
        x = x.movedim(1, -1) if x.dim() == 4 else x
        x = self.drop(x.to(self.down.weight.dtype))
        branch = self.up(self.down(x)) * 0.5
        return y + (branch.movedim(-1, 1) if y.dim() == 4 else branch).to(y.dtype)


class Residual(nn.Module):
    def __init__(self, *layers, in_place=False):
        super().__init__()
        self.layers, self.in_place = nn.Sequential(*layers), in_place

    def forward(self, x):
        y = self.layers(x)
        return y.add_(x) if self.in_place else x + y


class Checkpointed(nn.Module):
    def __init__(self, images, reentrant):
        super().__init__()
        self.layer, self.act, self.reentrant = linear(images), nn.SiLU(), reentrant
        self.norm, self.drop = norm(images, elementwise_affine=False), nn.Dropout(0.2)

    def forward(self, x):
        return checkpoint(self._region, x, use_reentrant=self.reentrant)

    def _region(self, x):
        return self.layer(self.drop(self.act(self.layer(self.norm(x)))))


class CheckpointedBlock(nn.Module):
    """The region is a module of its own, as transformers has it."""

    def __init__(self, images, reentrant):
        super().__init__()
        self.block, self.reentrant = nn.ModuleList([nn.Sequential(norm(images), linear(images), nn.GELU())]), reentrant

    def forward(self, x):
        return checkpoint(self.block[0], x, use_reentrant=self.reentrant)


def linear(images, bias=True):
    return nn.Conv2d(WIDTH, WIDTH, 1, bias=bias) if images else nn.Linear(WIDTH, WIDTH, bias=bias)


def wide(images):
    return nn.Conv2d(WIDTH, 2 * WIDTH, 1) if images else nn.Linear(WIDTH, 2 * WIDTH)


def norm(images, kind=nn.LayerNorm, **options):
    layer = kind(WIDTH, **options) if kind is nn.LayerNorm or kind is nn.RMSNorm else kind(*options.values())
    return ChannelsLast(layer) if images else layer


def of_channels(images, layer):
    return layer if images else ChannelsLast(layer)


def _frozen_weight(layer):
    layer.weight.requires_grad_(False)
    return layer


# Each makes a layer for rows (batch, tokens, WIDTH) or images (batch, WIDTH, height, width) that keeps the shape.
LAYERS = {
    "linear": linear,
    "no bias": lambda images: linear(images, bias=False),
    "frozen": lambda images: linear(images).requires_grad_(False),
    "frozen weight": lambda images: _frozen_weight(linear(images)),
    "conv": lambda images: nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if images else nn.Linear(WIDTH, WIDTH),
    "layer norm": norm,
    "layer norm, no affine": lambda images: norm(images, elementwise_affine=False),
    "layer norm, no bias": lambda images: norm(images, bias=False),
    "layer norm, frozen": lambda images: norm(images).requires_grad_(False),
    "rms norm": lambda images: norm(images, nn.RMSNorm),
    "rms norm, no affine": lambda images: norm(images, nn.RMSNorm, elementwise_affine=False, eps=1e-3),
    "rms norm in steps": lambda images: ChannelsLast(NormInSteps()) if images else NormInSteps(),
    "group norm": lambda images: of_channels(images, nn.GroupNorm(4, WIDTH)),
    "group norm, no affine": lambda images: of_channels(images, nn.GroupNorm(4, WIDTH, eps=1e-3, affine=False)),
    "batch norm": lambda images: nn.BatchNorm2d(WIDTH) if images else ChannelsLast(nn.BatchNorm1d(WIDTH)),
    "batch norm, no affine": lambda images: of_channels(
        images, (nn.BatchNorm2d if images else nn.BatchNorm1d)(WIDTH, affine=False)
    ),
    "frozen norm": lambda images: of_channels(images, (FrozenNorm2d if images else FrozenNorm1d)(WIDTH)),
    "pool": lambda images: nn.AvgPool2d(3, 1, 1) if images else nn.Softmax(-1),
    "dropout": lambda images: nn.Dropout(0.3),
    "no dropout": lambda images: nn.Dropout(0.0),
    "all dropped": lambda images: nn.Dropout(1.0),
    "gelu": lambda images: nn.GELU(),
    "gelu tanh": lambda images: nn.GELU(approximate="tanh"),
    "silu": lambda images: nn.SiLU(),
    "mish": lambda images: nn.Mish(),
    "hardswish": lambda images: nn.Hardswish(),
    "quick gelu": lambda images: QuickGELU(),
    "new gelu": lambda images: NewGELU(),
    "relu": lambda images: nn.ReLU(),
    "tanh": lambda images: nn.Tanh(),
    "softplus": lambda images: nn.Softplus(),
    "elu": lambda images: nn.ELU(),
    "prelu": lambda images: nn.PReLU(),
    "leaky relu in place": lambda images: nn.LeakyReLU(0.2, inplace=True),
    "silu in place": lambda images: nn.SiLU(inplace=True),
    "hardswish in place": lambda images: nn.Hardswish(inplace=True),
    "mish in place": lambda images: nn.Mish(inplace=True),
    "elu in place": lambda images: nn.ELU(inplace=True),
    "relu in place": lambda images: nn.ReLU(inplace=True),
    "dropout in place": lambda images: nn.Dropout(0.2, inplace=True),
    "written gelu": lambda images: WrittenGelu(linear(images)),
    "written swish": lambda images: WrittenSwish(linear(images)),
    "written in place": lambda images: WrittenInPlace(linear(images)),
    "written gate": lambda images: WrittenGate(linear(images)),
    "written of the input": lambda images: WrittenOfTheInput(linear(images)),
    "written, frozen": lambda images: WrittenGelu(linear(images)).requires_grad_(False),
    "swiglu": lambda images: Gate(images, lambda self, gate, up: F.silu(gate) * up),
    "swiglu, chunked": lambda images: Gate(images, lambda self, gate, up: up * F.silu(gate), chunked=True),
    "geglu": lambda images: Gate(images, lambda self, gate, up: self.act(gate) * up),
    "geglu, chunked": lambda images: Gate(images, lambda self, gate, up: self.act(gate) * up, chunked=True),
    "clamped gate": lambda images: Gate(images, clamped),
    "clamped gate, chunked": lambda images: Gate(images, clamped, chunked=True),
    "adapter": lambda images: Adapter(images, dropout=0.0),
    "adapter with dropout": lambda images: Adapter(images, dropout=0.1),
    "residual": lambda images: Residual(norm(images), linear(images), nn.GELU(), linear(images), nn.Dropout(0.1)),
    "residual in place": lambda images: Residual(norm(images), linear(images), nn.SiLU(), in_place=True),
    "checkpointed": lambda images: Checkpointed(images, reentrant=False),
    "checkpointed, reentrant": lambda images: Checkpointed(images, reentrant=True),
    "checkpointed block": lambda images: CheckpointedBlock(images, reentrant=False),
    "checkpointed block, reentrant": lambda images: CheckpointedBlock(images, reentrant=True),
}
# What is done to two values, or one, without a layer.
OF_TWO = {
    "add": lambda a, b: a + b,
    "add scaled": lambda a, b: torch.add(a, b, alpha=0.5),
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / (b.abs() + 1),
    "add in place": lambda a, b: a.add_(b),
    "multiply in place": lambda a, b: a.mul_(b),
    "where": lambda a, b: torch.where(a > b, a, b),
    "maximum": lambda a, b: torch.maximum(a, b),
    "detach": lambda a, b: a.detach() + b,
    "first halves": lambda a, b: torch.cat([a.chunk(2, dim=-1)[0], b.chunk(2, dim=-1)[1]], dim=-1),
    "mean of a stack": lambda a, b: torch.stack([a, b]).mean(0),
}
OF_ONE = {
    "scale": lambda a: a * 0.5,
    "scale in place": lambda a: a.mul_(0.5),
    "reshape": lambda a: a.reshape(a.shape[0], -1).view(a.shape),
    "transpose": lambda a: a.transpose(1, 2).contiguous().transpose(1, 2),
    "permute": lambda a: a.movedim(1, -1).contiguous().movedim(-1, 1),
    "halves": lambda a: torch.cat(a.chunk(2, dim=1)[::-1], dim=1),
    "rotated": lambda a: torch.cat((-a[..., a.shape[-1] // 2 :], a[..., : a.shape[-1] // 2]), dim=-1) * a,
    "slice": lambda a: a[:1].expand_as(a),
    "repeat": lambda a: a[:1].repeat(a.shape[0], *[1] * (a.dim() - 1)),
    "flat": lambda a: a.flatten().sigmoid().view_as(a),
    "roll": lambda a: a.roll(1, dims=1),
    "square": lambda a: a.square(),
    "cast": lambda a: a.double().to(a.dtype),
    "to fp32 and back": lambda a: a.float().sin().to(a.dtype),
    "dropped": lambda a: F.dropout(a, 0.1),
    "dropped in fp32": lambda a: F.dropout(a.float(), 0.1).to(a.dtype),
    "clamp": lambda a: a.clamp(-1, 0.5),
    "exp": lambda a: torch.exp(-a.abs()),
    "log": lambda a: torch.log1p(a.abs()),
    "norm by hand": lambda a: a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-2),
    "masked": lambda a: a.masked_fill(a > 1, 0.25),
    "clone": lambda a: a.clone(),
}


class Graph(nn.Module):
    """Runs steps one after another, each on one of the last values or two; returns what no step has taken.

    Args:
        steps: (name, first, second, shared): an entry of LAYERS, OF_ONE or OF_TWO, how many values back the operands
            are, and whether a layer of that name, if there is one already, is used again.
    """

    def __init__(self, steps, images):
        super().__init__()
        self.stem = linear(images)
        self.layers = nn.ModuleList()
        self.steps = []
        last = {}
        for name, first, second, shared in steps:
            if name in LAYERS and not (shared and name in last):
                last[name] = len(self.layers)
                self.layers.append(LAYERS[name](images))
            self.steps.append((name, last.get(name), first, second))

    def in_bfloat16(self):
        """As it is loaded: the adapters stay in 32 bits."""
        self.bfloat16()
        for module in self.modules():
            if isinstance(module, Adapter):
                module.down.float()
                module.up.float()
        return self

    def forward(self, x):
        values, taken = [self.stem(x)], set()
        for name, layer, first, second in self.steps:
            a, b = (max(len(values) - 1 - back, 0) for back in (first, second))
            taken |= {a, b} if name in OF_TWO else {a}
            if name in OF_TWO:
                values.append(OF_TWO[name](values[a], values[b]))
            else:
                function = self.layers[layer] if name in LAYERS else OF_ONE[name]
                values.append(function(values[a]))
        return tuple(value for index, value in enumerate(values) if index not in taken)


# Linear layers and convolutions keep what activations give: more of them, more sites that pay.
names = st.sampled_from([*LAYERS, *OF_ONE, *OF_TWO, *["linear", "conv", "layer norm", "add"] * 4])
back = st.sampled_from([0, 0, 0, 1, 2])
graphs = st.tuples(
    st.lists(st.tuples(names, back, back, st.booleans()), min_size=2, max_size=12),
    st.booleans(),  # images or rows
    st.booleans(),  # images in channels_last
    st.booleans(),  # left in training mode, or in evaluation mode and trained so
    st.sampled_from(["fp32", "fp32", "bf16", "autocast"]),
    st.booleans(),  # inverting: with as few elements as here, stock activations would run and be derived
)
