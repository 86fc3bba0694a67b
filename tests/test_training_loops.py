"""Patched models in the loops people train in: the gradients are the stock ones, and what was saved stays saved."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from training_alike import (
    HIDDEN,
    ROWS,
    WIDTH,
    OneModule,
    Stack,
    assert_same_gradients,
    gradients,
    loss_of,
    rows,
    stock_and_patched,
    train_once,
)

import invact
from invact.swapping.inversion import Inverted

# --- mixed precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [False, True], ids=["without scaler", "with scaler"])
def test_under_autocast_the_gradients_are_the_stock_ones_to_bf16_and_the_bytes_as_reported(scaled, count_kept):
    x = rows()
    stock, patched, report = stock_and_patched(Stack(), x, autocast=torch.bfloat16)
    exact = copy.deepcopy(stock)
    train_once(exact, x)
    for model in (stock, patched):
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model(x))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not scaled or scaler.get_scale() == 2.0**12  # no gradient overflowed

    def error(model):
        vectors = [torch.cat([g.flatten() for g in gradients(m).values()]) for m in (model, exact)]
        return (vectors[0] - vectors[1]).norm() / vectors[1].norm()

    assert error(patched) < 1.25 * error(stock)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, kept_by_stock = count_kept(patched, (x,)), count_kept(stock, (x,))
    # not to the byte: LayerNorm's two statistics per row are fp32 on a real CPU and bf16 on fake tensors
    assert kept == pytest.approx(report.bytes_after + report.weight_cast_bytes, rel=0.01)
    assert kept_by_stock == pytest.approx(report.bytes_before + report.weight_cast_bytes, rel=0.01)
    assert report.bytes_before - report.bytes_after == sum(site.bytes_saved for site in report.inverted)


def test_fp16_autocast_with_a_scaler_skips_the_same_steps_as_stock():
    x = 30 * rows()
    stock, patched, _ = stock_and_patched(Stack(), x, autocast=torch.float16)
    scales = []
    for model in (stock, patched):
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        history = []
        for _ in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model(x))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            history.append(scaler.get_scale())
        scales.append(history)
    assert scales[0][0] < 2.0**24  # it did overflow
    assert scales[0] == scales[1]
    assert all(torch.isfinite(p).all() for p in patched.parameters())


# --- unusual orders of forward and backward -----------------------------------------------------------


def test_gradients_accumulate_over_several_backwards():
    batches = [rows() for _ in range(3)]
    stock, patched, _ = stock_and_patched(Stack(), batches[0])
    for model in (stock, patched):
        for batch in batches:
            train_once(model, batch)
    assert_same_gradients(patched, stock)


def test_several_forwards_of_other_sizes_and_layouts_before_one_backward():
    batches = [rows(3), torch.randn(2, 5, WIDTH), torch.randn(WIDTH, 7).T, torch.randn(0, WIDTH), rows(1)]
    stock, patched, _ = stock_and_patched(Stack(), batches[0])
    for model in (stock, patched):
        torch.cat([model(batch).flatten() for batch in batches]).sin().sum().backward()
    assert_same_gradients(patched, stock)


def test_backward_twice_through_one_graph():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        loss = loss_of(model(x))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(patched, stock)


def test_changing_the_kept_output_in_place_before_backward_is_refused_as_in_stock_pytorch():
    y = invact.nn.GELU()(nn.Linear(WIDTH, HIDDEN)(rows()))
    loss = (y * 1.0).sum()
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_of_a_gradient_is_the_stock_one():
    x = rows().double()
    stock, patched, _ = stock_and_patched(Stack().double(), x)
    for model in (stock, patched):
        x_in = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(loss_of(model(x_in)), x_in, create_graph=True)
        (dx.square().sum() + loss_of(model(x_in))).backward()
    assert_same_gradients(patched, stock, tolerance=1e-5)


def test_torch_func_grad_vmap_and_jacobians_over_a_patched_model():
    from torch.func import functional_call, grad, jacrev, vmap

    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    weights = {name: p.detach() for name, p in stock.named_parameters()}

    def loss(weights, row, model):
        return functional_call(model, weights, (row,)).sin().sum()

    for transform in (
        lambda model: grad(partial(loss, model=model))(weights, x),
        lambda model: vmap(grad(partial(loss, model=model)), (None, 0))(weights, x),
        lambda model: jacrev(lambda w: functional_call(model, w, (x[0],)))(weights),
    ):
        ours, theirs = transform(patched), transform(stock)
        for name, expected in theirs.items():
            assert (ours[name] - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name
    train_once(patched, x), train_once(stock, x)
    assert_same_gradients(patched, stock)


def test_saved_tensors_may_go_to_the_cpu_and_back():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        with save_on_cpu():
            loss = loss_of(model(x))
        loss.backward()
    assert_same_gradients(patched, stock)


def test_saved_tensors_may_come_back_with_other_strides():
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    stock, patched, _ = stock_and_patched(conv, x, sites=1)
    for model in (stock, patched):
        with saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            loss = loss_of(model(x))
        loss.backward()
    assert_same_gradients(patched, stock)


# --- hooks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_first", [False, True], ids=["hooked, then patched", "patched, then hooked"])
def test_hooks_on_the_activation_see_and_change_what_they_do_in_the_stock_model(patch_first):
    x = rows()

    def hooked(model, seen):
        act = model.blocks[0].act
        act.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        act.register_forward_hook(lambda module, args, output: output + 0.25)
        act.register_full_backward_pre_hook(lambda module, grad: (grad[0] * 2.0,))
        act.register_full_backward_hook(lambda module, into, out: seen.append((into[0].clone(), out[0].clone())))

    stock, model, seen = Stack(), None, ([], [])
    model = copy.deepcopy(stock)
    if not patch_first:
        hooked(model, seen[1])
    invact.patch(model, (x,))
    if patch_first:
        hooked(model, seen[1])
    hooked(stock, seen[0])
    seen[1].clear()
    for each in (stock, model):
        train_once(each, x)
    assert len(seen[0]) == len(seen[1]) == 1
    for ours, theirs in zip(seen[1][0], seen[0][0], strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert_same_gradients(model, stock)

    invact.unpatch(model)
    train_once(model, x)
    assert len(seen[1]) == 2


def test_gradient_hooks_on_tensors_and_parameters_run_once_each():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        model.blocks[0].up.weight.register_hook(lambda grad: grad * 3.0)
        calls = []
        model.blocks[0].up.weight.register_post_accumulate_grad_hook(calls.append)
        x_in = x.clone().requires_grad_()
        x_in.register_hook(calls.append)
        train_once(model, x_in)
        assert len(calls) == 2
    assert_same_gradients(patched, stock)


# --- other devices and dtypes, locked and frozen parts ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_moved_to_another_dtype_after_patching(dtype):
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        train_once(model.to(dtype), x.to(dtype))
    assert all(p.dtype is dtype for p in patched.parameters())
    assert_same_gradients(patched, stock, tolerance={torch.float64: 1e-6}.get(dtype, 2e-2))


def test_a_patched_model_goes_to_meta_and_comes_back_and_is_told_there_as_shapes():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    state = stock.state_dict()
    patched.to("meta")
    output = patched(x.to("meta"))
    output.sum().backward()
    assert patched.embed.weight.grad.is_meta
    patched.to_empty(device="cpu")
    patched.load_state_dict(state)
    patched.zero_grad()
    for model in (stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)


def test_jagged_nested_tensors_run_the_stock_activation_in_a_patched_model():
    stock, patched, _ = stock_and_patched(OneModule(), rows(), sites=1)
    parts = [torch.randn(3, WIDTH), torch.randn(5, WIDTH)]
    for model in (stock, patched):
        model(torch.nested.nested_tensor(parts, layout=torch.jagged)).values().square().sum().backward()
    assert_same_gradients(patched, stock)


@pytest.mark.gpu
def test_a_model_moved_to_the_gpu_and_back_after_patching():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for device in ("cuda", "cpu"):
        for model in (stock, patched):
            model.zero_grad()
            train_once(model.to(device), x.to(device))
        assert_same_gradients(patched, stock, tolerance=1e-4)


@pytest.mark.gpu
def test_a_training_step_captured_in_a_cuda_graph_replays_to_the_stock_gradients():
    x = rows().cuda()
    stock, patched, _ = stock_and_patched(Stack().cuda(), x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            train_once(patched, x)
    torch.cuda.current_stream().wait_stream(stream)
    patched.zero_grad(set_to_none=True)
    graph, fixed = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        train_once(patched, fixed)
    for _ in range(2):
        batch = torch.randn_like(x)
        fixed.copy_(batch)
        patched.zero_grad(set_to_none=False)
        graph.replay()
        stock.zero_grad()
        train_once(stock, batch)
        assert_same_gradients(patched, stock, tolerance=1e-4)


@pytest.mark.gpu
def test_graphed_callables_of_a_patched_model_give_the_stock_gradients():
    x = rows().cuda()
    stock, patched, _ = stock_and_patched(Stack().cuda(), x)
    graphed = torch.cuda.make_graphed_callables(patched, (x.clone(),))
    patched.zero_grad()
    for model in (stock, graphed):
        train_once(model, x)
    assert_same_gradients(patched, stock, tolerance=1e-4)


def test_parameters_shared_between_threads_train_in_both():
    """As torch.nn.DataParallel and asynchronous trainers do: forward and backward in several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    batches = [rows() for _ in range(8)]
    stock, patched, _ = stock_and_patched(Stack(), batches[0])

    def gradient_of(model, batch):
        return torch.autograd.grad(loss_of(model(batch)), list(model.parameters()))

    def apart(model):
        """How far, relatively, the gradients of threads are from those of one after the other."""
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(partial(gradient_of, model), batches))
        alone = [gradient_of(model, batch) for batch in batches]
        pairs = [
            pair for found, expected in zip(together, alone, strict=True) for pair in zip(found, expected, strict=True)
        ]
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)

    assert apart(patched) <= 2 * apart(stock) + 1e-6
    for model in (stock, patched):
        train_once(model, batches[0])
    assert_same_gradients(patched, stock)


def test_training_for_many_steps_ends_at_the_stock_loss():
    x, target = rows(), torch.randn(ROWS, 4)
    stock, patched, _ = stock_and_patched(Stack(), x)
    losses = []
    for model in (stock, patched):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert isinstance(patched.blocks[0].act, Inverted)
