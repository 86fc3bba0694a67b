"""Entries of `invact.deriving.rules` that move, pad, cast or drop: the same bits, laid out as they were."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from operator_cases import COMPLEX, MOVED
from operator_checks import BF16, DOUBLE, FLOAT, FP16, LAYOUTS, SHAPE, assert_same, check, kept_for, leaf

from invact.deriving.handles import Derived, Kept
from invact.deriving.hooks import Deriving
from invact.deriving.masks import Bits, PackedMask
from invact.deriving.saved_by_node import kept_by

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", MOVED)
def test_what_moves(name):
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for layout in LAYOUTS:
            check(lambda x: MOVED[name](x.neg()), layout(dtype), name=name)


def test_the_transposed_is_a_step_on_the_way_and_kept_itself_as_the_weights_of_linear_layers_are():
    x = torch.randn(40, 60)
    check(lambda x: x.neg().t().tanh(), x)
    with Deriving():
        assert type(kept_for(leaf(x).neg().t())) is Kept


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers(name):
    for dtype in (DOUBLE, FLOAT):
        check(COMPLEX[name], torch.randn(SHAPE).to(dtype), name=name)
    check(lambda x: torch.complex(x, x) * torch.complex(x.neg(), x), torch.randn(SHAPE))


@pytest.mark.parametrize(
    "pad", [(1, 2), (0, 0, 2, 0), (0, 1, -1, 0), (-1, 2, 0, -2, 0, 1), (0, 0), (-1, -2), (0, 0, 0, 0, 0, 0, 1, 0)]
)
@pytest.mark.parametrize("value", [0.0, -0.0, -3.5, float("nan"), float("-inf")])
def test_padding_with_a_number(pad, value):
    for layout in LAYOUTS[:3]:
        check(lambda x: F.pad(x, pad, value=value), layout(FLOAT))


def test_padding_by_nothing_on_the_way():
    check(lambda x: F.pad(x, (0, 0, 0, 0)).tanh(), torch.randn(SHAPE))
    with Deriving():
        assert type(kept_for(F.pad(leaf(torch.randn(SHAPE)), (0, 1)).tanh())) is Kept


def test_a_copy_is_laid_out_as_it_was_though_it_was_a_step_before():
    x = leaf(torch.randn(64, 32).t())
    with Deriving():
        y = x.clone()  # as x lies, not contiguous
        handle = kept_for(y.neg())
        first = handle.made()
        again = kept_for(y)
    with torch.no_grad():
        assert_same(again.made(), y.detach())
        assert torch.equal(handle.made(), first)


def test_casts_there_and_back():
    for wide in (FLOAT, DOUBLE):
        for narrow in (BF16, FP16):
            check(lambda x, n=narrow, w=wide: x.to(n).to(w), torch.randn(SHAPE).to(wide))
            check(lambda x, n=narrow, w=wide: x.to(w).to(n), torch.randn(SHAPE).to(narrow))


def test_a_wide_copy_of_what_is_not_at_hand_is_kept_in_16_bits():
    x, w = leaf(torch.randn(64, 32)), leaf(torch.randn(48, 32))
    for narrow in (BF16, FP16):
        with Deriving():
            product = F.linear(x.to(narrow), w.to(narrow))
            wide = product.float()
            handle = kept_for(wide)
            assert type(handle) is Derived
            assert [(type(each), each.data.dtype) for each in handle.sources] == [(Kept, narrow)]
        with torch.no_grad():
            assert_same(handle.made(), wide.detach())


def test_dropout():
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        for p in (0.0, 0.1, 0.37, 1.0):
            x = torch.randn(SHAPE).to(dtype)
            check(lambda x, p=p: torch.native_dropout(x, p, True)[0], x, name="NativeDropoutBackward0")
            if 0 < p < 1:
                check(lambda x, p=p: F.dropout(x.neg(), p), x)


def test_a_dropped_tensor_is_made_from_the_bits_of_its_mask():
    """Also where somebody else keeps them, and however the tensor lies."""
    for layout in LAYOUTS:
        x = layout(FLOAT)
        if not torch.empty_like(x).is_contiguous(memory_format=torch.channels_last):
            continue
        check(lambda x: torch.native_dropout(x.neg(), 0.3, True)[0], x)
        moved = []

        def away(tensor, moved=moved):
            moved.append(tensor.dtype)
            return tensor.numpy().copy()

        for hooks in (torch.autograd.graph.saved_tensors_hooks(away, torch.from_numpy), contextlib.nullcontext()):
            with hooks, Deriving():
                y = torch.native_dropout(leaf(x).neg(), 0.3, True)[0]
                handle = kept_for(y)
            assert [type(each) for each in handle.sources][1:] == [PackedMask]
            assert_same(handle.made(), y.detach())
        assert torch.uint8 in moved
        assert torch.bool not in moved


def test_masks_are_kept_in_bits():
    x, y = leaf(torch.randn(SHAPE)), leaf(torch.randn(SHAPE))
    for layout in (lambda mask: mask, lambda mask: mask.contiguous(memory_format=torch.channels_last)):
        mask = layout(torch.rand(SHAPE) > 0.5)
        with Deriving():
            node = torch.where(mask, x, y).grad_fn
        handle = kept_by(node, "condition")
        assert type(handle) is Bits
        assert_same(handle.made(), mask)
