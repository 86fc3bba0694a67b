"""Models that hypothesis makes up: patching changes neither their results nor their gradients, and never costs."""

import copy
import gc
import weakref
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, assume, event, example, given, settings
from random_models import WIDTH, Graph, graphs
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import invact
from invact.swapping import inversion


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def place_and_size(held):
    storage = held.tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


@contextmanager
def no_garbage_collected():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def kept_and_alive(model, x, autocast):
    """Bytes that one real forward keeps for backward, of graphs that its outputs still hold; own tensors left out.

    And how many of the tensors live on, without the garbage collector, when the outputs are gone.
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    packed = []

    def pack(tensor):
        held = Held(tensor.detach())
        packed.append(weakref.ref(held))
        return held

    torch.manual_seed(0)
    with no_garbage_collected():
        with saved_tensors_hooks(pack, lambda held: held.tensor), autocast():
            output = model(x.clone())
        storages = dict(place_and_size(reference()) for reference in packed if reference() is not None)
        del output
        left = sum(reference() is not None for reference in packed)
    return sum(nbytes for address, nbytes in storages.items() if address not in own), left


def left_alive(model, x, autocast):
    """How many more tensors there are when one forward's outputs are dropped, without the garbage collector."""

    def count():
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    with no_garbage_collected():
        before = count()
        with autocast():
            output = model(x.clone())
        del output
        return count() - before


def trained_once(model, x, autocast):
    """Outputs, and the gradients of all parameters, each in one vector; None if there are no gradients."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    with autocast():
        outputs = [value for value in model(x.clone()) if value.requires_grad]
    if outputs:
        sum(value.float().square().mean() + value.float().sin().mean() for value in outputs).backward()
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    if not gradients:
        return None
    return torch.cat([value.detach().flatten().float() for value in outputs]), torch.cat(gradients)


def check(steps, images, channels_last, training, precision, inverting):
    with patch.object(inversion, "SMALLEST_INVERTED", 1 if inverting else inversion.SMALLEST_INVERTED):
        check_patched(steps, images, channels_last, training, precision)


def check_patched(steps, images, channels_last, training, precision):
    torch.manual_seed(0)
    model = Graph(steps, images).train(training)
    x = torch.randn(2, WIDTH, 4, 4) if images else torch.randn(3, 11, WIDTH)
    if images and channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if precision == "bf16":
        model, x = model.in_bfloat16(), x.bfloat16()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()

    try:
        stock = trained_once(copy.deepcopy(model), x, autocast)
        exactly = trained_once(copy.deepcopy(model).float(), x.float(), nullcontext)
    except RuntimeError as error:  # stock PyTorch itself refuses some changes in place, and some mixtures of dtypes
        refused = ("inplace", "in-place", "single memory location", "dtype", "Float", "BFloat16")
        assume(not any(words in str(error) for words in refused))
        raise
    assume(stock is not None and all(torch.isfinite(t).all() for t in stock))
    assume(stock[1].norm() < 1e4)
    before, left = kept_and_alive(copy.deepcopy(model), x, autocast)

    dtype = torch.bfloat16 if precision == "autocast" else None
    counted = invact.activation_memory(model, (x,), autocast=dtype)
    assert counted.total_bytes + counted.weight_cast_bytes == pytest.approx(before, rel=0.01)

    for exact in (True, False):
        ours = copy.deepcopy(model)
        report = invact.patch(ours, (x,), exact=exact, autocast=dtype)
        assert report.bytes_before == counted.total_bytes
        check_bytes(report, ours, x, autocast, before, left)
        learned = trained_once(copy.deepcopy(ours), x, autocast)
        for value, of_stock, in_fp32 in zip(learned, stock, exactly, strict=True):
            if not report.inverted:
                assert torch.equal(value, of_stock)
            elif precision == "fp32":
                assert (value - of_stock).norm() <= 1e-4 * of_stock.norm()
            else:  # as near to what 32 bits give as stock is, give or take one rounding
                off, stock_off = (value - in_fp32).norm(), (of_stock - in_fp32).norm()
                assert off <= 1.25 * stock_off + 2**-9 * in_fp32.norm()
        event(f"exact={exact}: {len(report.inverted)} sites inverted, {bool(report.derived)} derived")
        assert invact.unpatch(ours) == len(report.inverted)
        again = trained_once(ours, x, autocast)
        assert torch.equal(again[0], stock[0])
        assert torch.equal(again[1], stock[1])
        assert all(type(a) is type(b) for a, b in zip(ours.modules(), model.modules(), strict=True))


def check_bytes(report, model, x, autocast, before, left):
    after, left_after = kept_and_alive(copy.deepcopy(model), x, autocast)
    assert report.bytes_after + report.weight_cast_bytes == pytest.approx(after, rel=0.01)
    assert after <= before
    assert report.bytes_floor <= report.bytes_after
    if not any("checkpointed" in note for note in report.notes):  # where what is saved is a peak's
        saved = sum(site.bytes_saved for site in report.inverted) + sum(tensor.bytes_saved for tensor in report.derived)
        assert saved == pytest.approx(before - after, rel=0.01, abs=100)
    assert left_after <= left
    assert left_alive(copy.deepcopy(model), x, autocast) <= 0


@pytest.fixture(scope="module", autouse=True)
def little_garbage_to_look_for():
    """What was there before no collection goes over again: there are dozens of them per model."""
    invact.plan(nn.Linear(WIDTH, WIDTH), (torch.ones(1, WIDTH),))  # imports what PyTorch does when first asked
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


unhurried = settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


def once_wrong(*steps, images=False, channels_last=False, training=True, precision="fp32", inverting=False):
    steps = [(name, back, 0, False) for name, back in steps]
    return example((steps, images, channels_last, training, precision, inverting))


@settings(unhurried, max_examples=16, derandomize=True)
@given(graphs)
@once_wrong(("repeat", 0), ("batch norm, no affine", 0), ("slice", 0), ("slice", 0), ("new gelu", 0), inverting=True)
@once_wrong(("transpose", 0), ("group norm, no affine", 1), ("silu in place", 0), ("written gate", 2), inverting=True)
@once_wrong(("dropout", 0), ("layer norm, no bias", 0), ("square", 2), ("layer norm", 2), images=True)
@once_wrong(("clone", 0), ("written swish", 0), ("quick gelu", 2), images=True, channels_last=True, precision="bf16")
@once_wrong(("rms norm", 0), ("clamped gate, chunked", 2), ("layer norm", 2), precision="autocast", inverting=True)
@once_wrong(("mish in place", 2), ("checkpointed, reentrant", 1), precision="bf16", training=False)
@once_wrong(("frozen norm", 0), ("batch norm, no affine", 0), images=True, channels_last=True, precision="autocast")
@once_wrong(("detach", 1), ("quick gelu", 0), ("where", 2), images=True, channels_last=True, precision="bf16")
def test_some_random_models_are_patched_without_a_change_in_what_they_learn(graph):
    check(*graph)


@pytest.mark.slow
@settings(unhurried, max_examples=1000)
@given(graphs)
def test_a_thousand_random_models_are_patched_without_a_change_in_what_they_learn(graph):
    check(*graph)
