"""Two processes over gloo: what is derived there gives stock PyTorch's gradients, bit for bit, and less is kept."""

import copy
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from two_processes import RANKS

import invact

pytestmark = pytest.mark.distributed

WIDTH, HIDDEN, ROWS = 64, 128, 64


class WrittenOutNorm(nn.Module):
    """As Hugging Face writes it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class PostNorm(nn.Module):
    """The norm's output is wanted by the next layer, when FSDP has freed this one's weight."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.down(self.act(self.up(x))))


class Gated(nn.Module):
    """A pre-norm layer with a gated product."""

    def __init__(self):
        super().__init__()
        self.norm = WrittenOutNorm()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Stack(nn.Module):
    def __init__(self, unused=False):
        super().__init__()
        self.embed, self.first = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList([PostNorm(), PostNorm(), Gated(), Gated()])
        self.last, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 8)
        self.unused = nn.Linear(WIDTH, WIDTH) if unused else None

    def forward(self, x):
        x = self.first(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def model_and_batch(rank, **options):
    torch.manual_seed(0)
    model = Stack(**options)
    with torch.no_grad():  # so that each norm's weight and bias matter
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model, torch.randn(RANKS, ROWS, WIDTH)[rank]


def loss_of(output):
    return output.float().square().mean() + output.float().sin().mean()


def gradients(model, batch, steps=2, autocast=False):
    """Of all parameters, those that two steps add up."""
    model.zero_grad()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = model(batch)
        loss_of(output).backward()
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        found[name] = None if grad is None else grad.clone()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], grad), (name, (found[name] - grad).abs().max())


def assert_as_stock(rank, wrap, autocast=False, share=0.8, **options):
    """Wrapped, a patched copy trains as a stock copy does and keeps less."""
    stock, batch = model_and_batch(rank, **options)
    patched = copy.deepcopy(stock)
    report = invact.patch(patched, (batch,), exact=True, autocast=torch.bfloat16 if autocast else None)
    assert report.bytes_after < share * report.bytes_before, str(report)
    stock, patched = wrap(stock), wrap(patched)
    expected = gradients(stock, batch, autocast=autocast)
    assert_same(gradients(patched, batch, autocast=autocast), expected)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        assert really_kept(patched, batch) < share * really_kept(stock, batch)


class Held:
    """Goes with the part of the graph that holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def really_kept(model, batch):
    """Bytes that autograd holds for backward, without the parameters, gathered or not."""
    held = weakref.WeakSet()

    def pack(tensor):
        kept = Held(tensor.detach())
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        output = model(batch)
    own = {storage_of(p)._cdata for p in model.parameters()}
    storages = {storage._cdata: storage.nbytes() for storage in (storage_of(kept.tensor) for kept in list(held))}
    del output
    return sum(nbytes for identity, nbytes in storages.items() if identity not in own)


def storage_of(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()


# --- data parallel ------------------------------------------------------------------------------------


def data_parallel(rank, **options):
    from torch.nn.parallel import DistributedDataParallel

    unused = options.get("find_unused_parameters", False)
    assert_as_stock(rank, lambda model: DistributedDataParallel(model, **options), unused=unused)


@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=["plain", "static graph", "unused parameters", "bucket views"],
)
def test_data_parallel_training_derives(two_processes, options):
    two_processes(data_parallel, **options)


def data_parallel_under_autocast(rank):
    from torch.nn.parallel import DistributedDataParallel

    assert_as_stock(rank, DistributedDataParallel, autocast=True)


def test_data_parallel_training_derives_under_autocast(two_processes):
    two_processes(data_parallel_under_autocast)


# --- fully sharded ------------------------------------------------------------------------------------


fsdp_on_this_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this PyTorch runs on GPUs alone"
)


def sharded(model, kinds, **options):
    from torch.distributed.fsdp import fully_shard

    for module in reversed(list(model.modules())):
        if isinstance(module, kinds):
            fully_shard(module, **options)
    return fully_shard(model, **options)


def fully_sharded(rank, kinds, mixed=False, offload=False, reshard=True):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    options = {"reshard_after_forward": reshard}
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    assert_as_stock(rank, partial(sharded, kinds=kinds, **options))


BLOCKS = (PostNorm, Gated)
# Each norm by itself: freed after its own forward, gathered when its own backward begins, wanted by those after it.
NORMS = (nn.LayerNorm, WrittenOutNorm, nn.RMSNorm)


@fsdp_on_this_cpu
@pytest.mark.parametrize("kinds", [BLOCKS, NORMS, BLOCKS + NORMS], ids=["blocks", "norms", "both"])
@pytest.mark.parametrize(
    "options",
    [{}, {"mixed": True}, {"offload": True}, {"reshard": False}],
    ids=["fp32", "bf16", "offloaded", "not resharded"],
)
def test_fully_sharded_training_derives_where_norms_are_freed(two_processes, kinds, options):
    two_processes(fully_sharded, kinds=kinds, **options)


def sharded_the_old_way(rank, original, mixed):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    wrap = partial(
        FullyShardedDataParallel,
        auto_wrap_policy=ModuleWrapPolicy({*BLOCKS, *NORMS}),
        use_orig_params=original,
        mixed_precision=precision,
        device_id=torch.device("cpu"),
    )
    assert_as_stock(rank, wrap)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("original", [False, True], ids=["flat", "original parameters"])
def test_training_sharded_the_old_way_derives(two_processes, original, mixed):
    two_processes(sharded_the_old_way, original=original, mixed=mixed)


def exchanged(rank):
    """As DeepSpeed does it: `.data` is empty from the end of a layer's forward to the beginning of its backward."""
    wholes = {}

    def gather(module, *_):
        for p in module.parameters(recurse=False):
            p.data = wholes[p]

    def free(module, _, output):
        output.register_hook(lambda grad: gather(module))
        for p in module.parameters(recurse=False):
            p.data = torch.empty(0)

    def wrap(model):
        for module in model.modules():
            for p in module.parameters(recurse=False):
                wholes[p] = p.data
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(free)
        return model

    stock, batch = model_and_batch(rank)
    patched = copy.deepcopy(stock)
    expected = gradients(stock, batch)
    invact.patch(patched, (batch,), exact=True)
    assert_same(gradients(wrap(patched), batch), expected)


def test_parameters_whose_data_is_exchanged_are_not_read_when_they_are_gone(two_processes):
    two_processes(exchanged)


# --- tensor parallel ----------------------------------------------------------------------------------


def tensor_parallel(rank, sequence, patch_first):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (RANKS,))

    rows = Shard(0) if sequence else Replicate()  # between the products each rank has its rows, or all
    column, row = ColwiseParallel(input_layouts=rows), RowwiseParallel(output_layouts=rows)
    of_rows = SequenceParallel(sequence_dim=0, use_local_output=True)

    def wrap(model):
        if sequence:
            embed = RowwiseParallel(input_layouts=Replicate(), output_layouts=rows)
            parallelize_module(model, mesh, {"embed": embed, "first": of_rows})
        for block in model.blocks:
            plan = {"up": column, "down": row}
            if isinstance(block, Gated):
                plan["gate"] = column
            elif sequence:
                plan["norm"] = of_rows
            parallelize_module(block, mesh, plan)
        return model

    stock, batch = model_and_batch(0)
    patched = copy.deepcopy(stock)
    if patch_first:
        invact.patch(patched, (batch,), exact=True)
        patched = wrap(patched)
    else:
        patched = wrap(patched)
        invact.patch(patched, (batch,), exact=True)
    stock = wrap(stock)
    assert_same(gradients(patched, batch), gradients(stock, batch))
    kept, before = really_kept(patched, batch), really_kept(stock, batch)
    assert kept < (0.9 if sequence else 0.8) * before, (kept, before)  # what is a DTensor is kept


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched, then split", "split, then patched"])
@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_tensor_parallel_training_derives(two_processes, sequence, patch_first):
    two_processes(tensor_parallel, sequence=sequence, patch_first=patch_first)


# --- pipeline stages ----------------------------------------------------------------------------------


def pipeline(rank, schedule):
    from torch.distributed import pipelining

    model, _ = model_and_batch(0)
    batch = model_and_batch(0)[1].repeat(4, 1)
    parts = [
        nn.Sequential(model.embed, model.first, *model.blocks[:2]),
        nn.Sequential(*model.blocks[2:], model.last, model.head),
    ]
    part = parts[rank]

    def trained(part):
        stage = pipelining.PipelineStage(part, rank, RANKS, torch.device("cpu"))
        run = getattr(pipelining, schedule)(stage, n_microbatches=4, loss_fn=lambda output, _: loss_of(output))
        part.zero_grad()
        if rank == 0:
            run.step(batch)
        else:
            run.step(target=torch.zeros(len(batch)))
        return {name: p.grad for name, p in part.named_parameters()}

    patched = copy.deepcopy(part)
    example = batch[:ROWS]
    report = invact.patch(patched, (example,), exact=True)
    assert report.bytes_after < 0.8 * report.bytes_before, str(report)
    assert_same(trained(patched), trained(part))
    dist.barrier()


@pytest.mark.parametrize("schedule", ["ScheduleGPipe", "Schedule1F1B"])
def test_pipeline_stages_derive(two_processes, schedule):
    two_processes(pipeline, schedule=schedule)
