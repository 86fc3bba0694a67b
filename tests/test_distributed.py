"""Two processes over gloo: patched and sharded models get the gradients that one process gets without us."""

import copy
from functools import partial

import pytest
import torch
from training_alike import HIDDEN, WIDTH, Feed, Stack, loss_of
from two_processes import RANKS

import invact

pytestmark = pytest.mark.distributed

ROWS = 32


def model_and_batches():
    """The same on every rank: a model, and one batch per rank."""
    torch.manual_seed(0)
    return Stack(), torch.randn(RANKS, ROWS, WIDTH)


def gradients_of_one_process(model, batches):
    """The mean over the batches, as data parallel training computes it."""
    stock = copy.deepcopy(model)
    (sum(loss_of(stock(batch)) for batch in batches) / len(batches)).backward()
    return {name: p.grad for name, p in stock.named_parameters()}


def assert_gradients(model, expected, tolerance=1e-5):
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    found = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in found.items()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert (grad.float() - expected[name]).norm() <= tolerance * expected[name].norm() + 1e-7, name


def assert_inverted(report, sites=2):
    """The modules; an expression is inverted only where that saves more than deriving."""
    modules = [site for site in report.sites if ":" not in site.path]
    assert [site.action for site in modules] == ["invert"] * sites, str(report)


# --- data parallel ------------------------------------------------------------------------------------


def data_parallel(rank, patch_first, compress):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    model, batches = model_and_batches()
    expected = gradients_of_one_process(model, batches)
    if patch_first:
        assert_inverted(invact.patch(model, (batches[rank],)))
    parallel = DistributedDataParallel(model)
    if compress:
        parallel.register_comm_hook(None, fp16_compress_hook)
    if not patch_first:
        assert_inverted(invact.patch(parallel, (batches[rank],)))
    for _ in range(2):  # DDP settles its buckets after the first step
        parallel.zero_grad()
        loss_of(parallel(batches[rank])).backward()
        assert_gradients(parallel, expected, tolerance=2e-3 if compress else 1e-5)
    with parallel.no_sync():
        loss_of(parallel(batches[rank])).backward()
    assert invact.unpatch(parallel) == 2


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "fp16 compression"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patched, then wrapped", "wrapped, then patched"])
def test_data_parallel_training_gets_the_gradients_of_one_process(two_processes, patch_first, compress):
    two_processes(data_parallel, patch_first=patch_first, compress=compress)


# --- fully sharded ------------------------------------------------------------------------------------


fsdp_on_this_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this PyTorch runs on GPUs alone"
)


def shard(model, policy):
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        if isinstance(module, Feed):
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def fully_sharded(rank, checkpointed, mixed):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, batches = model_and_batches()
    expected = gradients_of_one_process(model, batches)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = policy if mixed else MixedPrecisionPolicy()
    if checkpointed:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Feed))
    assert_inverted(invact.patch(model, (batches[rank],), autocast=torch.bfloat16 if mixed else None))
    shard(model, policy)
    for _ in range(2):
        model.zero_grad()
        loss_of(model(batches[rank])).backward()
        assert_gradients(model, expected, tolerance=3e-2 if mixed else 1e-5)
    assert invact.unpatch(model) == 2
    model.zero_grad()
    loss_of(model(batches[rank])).backward()
    assert_gradients(model, expected, tolerance=3e-2 if mixed else 1e-5)


@fsdp_on_this_cpu
@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_patched_then_fully_sharded_training_gets_the_gradients_of_one_process(two_processes, checkpointed, mixed):
    two_processes(fully_sharded, checkpointed=checkpointed, mixed=mixed)


def sharded_first(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model, batches = model_and_batches()
    expected = gradients_of_one_process(model, batches)
    shard(model, MixedPrecisionPolicy())
    with pytest.raises(ValueError, match="already sharded by FSDP"):
        invact.patch(model, (batches[rank],))
    loss_of(model(batches[rank])).backward()
    assert_gradients(model, expected)


@fsdp_on_this_cpu
def test_a_model_that_is_already_sharded_is_refused_and_trains_on(two_processes):
    two_processes(sharded_first)


# --- tensor parallel ----------------------------------------------------------------------------------


def tensor_parallel(rank, patch_first, local):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, batches = model_and_batches()
    expected = gradients_of_one_process(model, batches[:1])
    if patch_first:
        assert_inverted(invact.patch(model, (batches[0],)))
    mesh = init_device_mesh("cpu", (RANKS,))
    column = partial(ColwiseParallel, use_local_output=local)
    plan = {"up": column(), "up2": column(), "down": RowwiseParallel(), "down2": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    sites = 2
    if not patch_first:
        report = invact.patch(model, (batches[0],))
        assert_inverted(report)
        sites = len(report.inverted)  # what is split is not derived: there the expressions are inverted too
        # each rank keeps its half of every hidden layer
        one_call = ROWS * HIDDEN // RANKS
        assert {site.bytes_saved for site in report.inverted} == {4 * one_call - one_call // 8}
    loss_of(model(batches[0])).backward()
    assert_gradients(model, expected)
    assert invact.unpatch(model) == sites


@pytest.mark.parametrize("local", [True, False], ids=["local tensors", "DTensors"])
@pytest.mark.parametrize("patch_first", [True, False], ids=["patched, then split", "split, then patched"])
def test_tensor_parallel_training_gets_the_gradients_of_one_process(two_processes, patch_first, local):
    two_processes(tensor_parallel, patch_first=patch_first, local=local)


def in_place_on_a_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, whole = init_device_mesh("cpu", (RANKS,)), torch.linspace(-3, 3, 32).view(4, 8)
    expected = torch.func.grad(lambda x: torch.nn.functional.silu(x).sum())(whole)
    x = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    inner = x * 1.0
    y = invact.functional.silu(inner, inplace=True)
    assert y is inner
    torch.testing.assert_close(y.full_tensor(), torch.nn.functional.silu(whole))
    y.sum().backward()
    torch.testing.assert_close(x.grad.full_tensor(), expected, atol=1e-4, rtol=1e-4)


def test_in_place_on_a_dtensor_changes_it(two_processes):
    two_processes(in_place_on_a_dtensor)


def tensor_parallel_in_transformers(rank, folder):
    from transformers import LlamaForCausalLM

    ids = {"input_ids": torch.arange(16).view(2, 8)}
    stock = LlamaForCausalLM.from_pretrained(folder).train()
    loss_of(stock(**ids).logits).backward()
    expected = {name: p.grad for name, p in stock.named_parameters()}
    model = LlamaForCausalLM.from_pretrained(folder, tp_plan="auto").train()
    report = invact.patch(model, ids)
    assert_inverted(report, sites=2)
    loss_of(model(**ids).logits).backward()
    assert_gradients(model, expected, tolerance=1e-4)


def test_tensor_parallel_as_transformers_does_it_gets_the_gradients_of_one_process(two_processes, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=32, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    two_processes(tensor_parallel_in_transformers, folder=str(tmp_path))
