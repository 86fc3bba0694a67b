"""Small models with activations of both kinds, and whether a patched one trains as its stock twin does."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import invact

WIDTH, HIDDEN, ROWS = 16, 64, 8
# Bytes that inverting one call frees in fp32: the input, less one bit per element.
FREED = ROWS * HIDDEN * 4 - ROWS * HIDDEN // 8


class Feed(nn.Module):
    """One activation that is a module and one that is an expression, both between linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.up2, self.down2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        x = x + self.down(self.act(self.up(x)))
        return x + self.down2(F.silu(self.up2(self.norm(x))))


class Stack(nn.Module):
    """Two blocks, each under gradient checkpointing if `reentrant` is not None."""

    def __init__(self, blocks=2, reentrant=None):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Feed() for _ in range(blocks))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def rows(n=ROWS):
    return torch.randn(n, WIDTH)


def stock_and_patched(model, x, sites=4, **options):
    """A copy of the model as it was, and the model patched."""
    stock = copy.deepcopy(model)
    report = invact.patch(model, (x,), **options)
    assert len(report.inverted) == sites
    return stock, model, report


def loss_of(output):
    return output.float().square().mean() + output.float().sin().mean()


def train_once(model, x):
    loss_of(model(x)).backward()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(patched, stock, tolerance=1e-5):
    ours, theirs = gradients(patched), gradients(stock)
    assert list(ours) == list(theirs)
    assert ours
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-7, name


def kept_by_call(call, model):
    """Bytes of the storages that `call` keeps for backward, the model's own left out; and what it returned."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = []

    def pack(tensor):
        held.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(nbytes for address, nbytes in storages.items() if address not in own), output


class OneModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class OneExpression(OneModule):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))
