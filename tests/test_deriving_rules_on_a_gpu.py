"""Entries of `invact.deriving.rules` on a GPU, with what it alone has a kernel for."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import MOVED, NORMS, ONE, SEVERAL
from operator_checks import BF16, DOUBLE, FLOAT, FP16, LAYOUTS, SHAPE, check, uniform

pytestmark = pytest.mark.usefixtures("one_thread")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("name", [*ONE, *SEVERAL, *MOVED])
def test_operators_on_a_gpu(name):
    if name == "UpsampleBilinear2DBackward0":
        pytest.skip("it is not derived there")
    for dtype in (FLOAT, BF16):
        for layout in LAYOUTS:
            if name in ONE:
                function, low, high = ONE[name]
                check(function, layout(dtype, low, high).cuda(), name=name)
            elif name in SEVERAL:
                check(SEVERAL[name], layout(dtype, 0, 1).cuda(), uniform(SHAPE, dtype, 0, 1).cuda(), name=name)
            else:
                check(lambda x: MOVED[name](x.neg()), layout(dtype).cuda(), name=name)


@on_a_gpu
def test_dropout_on_a_gpu_for_every_percentage():
    """The kernel's own scale differs from 1 / (1 - p), rounded, for 15 and 45 per cent, and for others."""
    for dtype in (DOUBLE, FLOAT, BF16, FP16):
        x = torch.randn(SHAPE).to(dtype).cuda()
        for percent in range(1, 100):
            check(lambda x, p=percent / 100: F.dropout(x.neg(), p), x, name="NativeDropoutBackward0")


@on_a_gpu
@pytest.mark.parametrize("name", [name for name in NORMS if "eval" not in name])
@pytest.mark.parametrize("dtype", [FLOAT, BF16, FP16])
def test_norms_on_a_gpu(name, dtype):
    norm, shape = NORMS[name]
    # Of the norms of a GPU only batch norm takes wide weights beside narrow inputs.
    for weights in {dtype, FLOAT} if "batch" in name else {dtype}:
        w, b = torch.rand(shape).to(weights).cuda(), torch.randn(shape).to(weights).cuda()
        for layout in LAYOUTS:
            x = layout(dtype).cuda()
            for eps in (1e-5, 0.3):
                if name == "rms norm":
                    check(lambda x, w, eps=eps: norm(x, w, None, eps), x, w)
                else:
                    check(lambda x, w, b, eps=eps: norm(x, w, b, eps), x, w, b)
