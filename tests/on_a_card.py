"""What tests of a card share: the device, gradients compared, a layer that derives, and a step captured in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NEEDS_A_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no card")


def gradients(model: nn.Module) -> Tensor:
    parts = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat([part.float().flatten() for part in parts])


def assert_same_gradients(patched: nn.Module, stock: nn.Module, within: float = 1e-4) -> None:
    ours, theirs = gradients(patched), gradients(stock)
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= within * theirs.norm()


@contextmanager
def sharding_over_one_process(folder) -> Iterator[Callable[[nn.Module], object]]:
    """FSDP2's `fully_shard` over a mesh of one device."""
    if DEVICE.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("FSDP2 of this PyTorch runs on GPUs alone")
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting_point", rank=0, world_size=1)
    try:
        yield partial(fully_shard, mesh=dist.device_mesh.init_device_mesh(DEVICE.type, (1,)))
    finally:
        dist.destroy_process_group()


class Gated(nn.Module):
    """A layer as a Llama has it, and a norm and a linear layer after it: norms, a gated product, dropout, a sum."""

    def __init__(self, width: int, dropout: float, norm: Callable[[int], nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.norm, self.last = norm(width), nn.LayerNorm(width)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.out = nn.Linear(2 * width, width), nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        inner = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return self.out(self.last(x + F.dropout(inner, self.dropout)))


def step(model: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    (model(x) * torch.linspace(-1, 1, x.shape[1], device=x.device)).sum().backward()


def assert_replays_to_stocks_gradients(patched: nn.Module, stock: nn.Module, x: Tensor) -> None:
    """A step captured in a CUDA graph."""
    directions = torch.linspace(-1, 1, x.shape[1], device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            (patched(x) * directions).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    patched.zero_grad(set_to_none=True)
    graph, fixed = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        (patched(fixed) * directions).sum().backward()
    for _ in range(2):
        fixed.copy_(torch.randn_like(x))
        patched.zero_grad(set_to_none=False)
        stock.zero_grad()
        graph.replay()
        step(stock, fixed)
        assert_same_gradients(patched, stock)


def held_by_forward(model: nn.Module, inputs: tuple[Tensor, ...] | dict[str, Tensor]) -> int:
    """Bytes that the allocator holds after it; a step is taken to its end."""
    before = torch.cuda.memory_allocated()
    output = model(**inputs)[0] if isinstance(inputs, dict) else model(*inputs)
    held = torch.cuda.memory_allocated() - before
    output.sum().backward()
    model.zero_grad()
    return held
