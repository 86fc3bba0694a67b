"""Tensors in every layout, and whether what is derived of them is in every bit what the operator gave."""

import torch

from invact.deriving.handles import Derived
from invact.deriving.hooks import Deriving
from invact.deriving.saved_by_node import kept_by

aten = torch.ops.aten
DOUBLE, FLOAT, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPE = (3, 6, 9, 11)  # 1,782 elements, with a rest behind the last whole vector


def leaf(values):
    return values.detach().requires_grad_()


def uniform(shape, dtype, low, high):
    return (low + (high - low) * torch.rand(shape)).to(dtype)


def contiguous(dtype, low=-4, high=4):
    return uniform(SHAPE, dtype, low, high)


def channels_last(dtype, low=-4, high=4):
    return uniform(SHAPE, dtype, low, high).contiguous(memory_format=torch.channels_last)


def transposed(dtype, low=-4, high=4):
    return uniform((9, 11, 3, 6), dtype, low, high).permute(2, 3, 0, 1)


def sliced(dtype, low=-4, high=4):
    return uniform((3, 6, 9, 22), dtype, low, high)[..., ::2]


def broadcast(dtype, low=-4, high=4):
    return uniform((3, 6, 1, 11), dtype, low, high).expand(SHAPE)


LAYOUTS = [contiguous, channels_last, transposed, sliced, broadcast]


def in_bits(tensor):
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.contiguous().view(kind[tensor.element_size()])


def assert_same(ours, stock):
    """In dtype, shape, strides and every bit; one NaN is as good as another."""
    assert (ours.dtype, ours.shape, ours.stride()) == (stock.dtype, stock.shape, stock.stride())
    if stock.is_complex():
        ours, stock = torch.view_as_real(ours), torch.view_as_real(stock)
    alike = (in_bits(ours) == in_bits(stock)) | (ours.isnan() & stock.isnan())
    assert alike.all(), f"{(~alike).sum()} of {stock.numel()} differ"


def kept_for(tensor):
    """What is kept of a tensor that the next operator wants."""
    return kept_by((tensor * tensor).grad_fn, "self")


def gradients(make, inputs, consume):
    """Of all inputs, for a loss in which the output is kept."""
    output = make(*inputs)
    seen = consume(output) if consume else None
    loss = (output * output).abs().sum()
    wanted = [each for each in inputs if each.requires_grad]
    return output, seen, torch.autograd.grad(loss, wanted, allow_unused=True)


def check(make, *values, name=None, frozen=()):
    """Asserts that the output of `make` is derived, and equal to the original, and that gradients are stock's.

    Args:
        make: a function of the tensors `values`, whose last operator is the one that is tried.
        name: of its node.
        frozen: places among the values of those that need no gradient.
    """
    inputs = [each.detach() if place in frozen else leaf(each) for place, each in enumerate(values)]
    torch.manual_seed(1)
    _, _, expected = gradients(make, inputs, None)
    torch.manual_seed(1)
    with Deriving():
        output, handle, found = gradients(make, inputs, kept_for)
    if name is not None:
        assert output.grad_fn.name() == name
    assert isinstance(handle, Derived)
    with torch.no_grad():
        for _ in range(2):  # as for a graph that is run again
            assert_same(handle.made(), output.detach())
    for ours, stock in zip(found, expected, strict=True):
        assert (ours is None) == (stock is None)
        if stock is not None:
            assert_same(ours, stock)
