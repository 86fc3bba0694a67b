"""What is derived is right in every circumstance: a patched model trains as its stock twin does, bit for bit."""

import copy
import functools
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import invact
from invact.deriving import handles, hooks, masks, shared

WIDTH = 64
X = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 32, 32, dtype=torch.bool).triu(1)
MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask=None, context=None):
        h = self.norm1(x)
        other = h if context is None else context
        q, k, v = self.q(h), self.k(other), self.v(other)
        scores = q @ k.transpose(-1, -2) / 8
        if mask is not None:
            scores = scores.masked_fill(mask, -1e4)
        x = x + self.dropout(self.o(scores.softmax(-1) @ v))
        h = self.norm2(x)
        return x + self.dropout(self.down(F.silu(self.gate(h)) * self.up(h)))


def plain(block, *args):
    return block(*args)


class Net(nn.Module):
    """Blocks between two linear layers, each run by `run`."""

    def __init__(self, dropout=0.0, run=None):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.run = run or plain

    def forward(self, x, mask=None):
        x = self.first(x)
        for block in self.blocks:
            x = self.run(block, x, mask)
        return self.last(self.norm(x))


class Normed(nn.Module):
    """A norm between linear layers, with something done to what it gives."""

    def __init__(self, between=lambda h: h):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between = between

    def forward(self, x):
        self.x = self.first(x)
        self.h = self.norm(self.x)
        return self.last(self.between(self.h))


def twins(stock, inputs=(X,)):
    """A model and its patched copy."""
    ours = copy.deepcopy(stock)
    report = invact.patch(ours, inputs, exact=True)
    assert report.derived
    return stock, ours


def step(model):
    model(X).square().mean().backward()


def masked_step(model):
    model(X, MASK).square().mean().backward()


def gradients(model, train):
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    train(model)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_alike(stock, ours, train=step):
    expected, found = gradients(stock, train), gradients(ours, train)
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        same = found[name] is None if gradient is None else torch.equal(gradient, found[name])
        assert same, name
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


def assert_left_alone(stock, why):
    """Asserts that nothing is derived of a model, that the report says why, and that it trains as before."""
    ours = copy.deepcopy(stock)
    report = invact.patch(ours, (X,), exact=True)
    assert not report.derived
    assert why in report.notes[-1]
    assert_alike(stock, ours)


def bytes_outside(train, *models):
    """Bytes that the hooks outside are given, model by model."""
    counts = []
    for model in models:
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            train(model)
        counts.append(sum(storage.nbytes() for storage in storages.values()))
    return counts


# --- changed in place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [lambda m: m.x, lambda m: m.norm.weight, lambda m: m.last.weight], ids=["source", "norm", "linear"]
)
def test_what_stock_refuses_is_refused_with_its_words(changed):
    for model in twins(Normed()):
        loss = model(X).square().mean()
        with torch.no_grad():
            changed(model).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_was_derived_may_be_changed_afterwards_and_its_gradient_stays_right():
    """Stock refuses this, since it keeps the tensor; nobody here needs what it holds now."""
    stock, ours = twins(Normed())
    expected = gradients(stock, step)
    loss = ours(X).square().mean()
    with torch.no_grad():
        ours.h.mul_(2)
    loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in ours.named_parameters())


def test_a_weight_changed_between_forward_and_backward_under_autocast_as_stock_allows_it():
    stock, ours = twins(Net())

    def train(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(X).float().square().mean()
        with torch.no_grad():
            for layer in (model.first, model.last):
                layer.weight.mul_(2)
        loss.backward()
        with torch.no_grad():
            for layer in (model.first, model.last):
                layer.weight.div_(2)

    assert_alike(stock, ours, train)


def _no_grad(h):
    with torch.no_grad():
        h[:, ::2].mul_(2)


CHANGES = {"no_grad": _no_grad, "data": lambda h: h.data.mul_(2), "detach": lambda h: h.detach().mul_(2)}
READS = {
    "itself": lambda h: h,
    "step": lambda h: h * 1.5,
    "cast": lambda h: h.to(torch.bfloat16).to(torch.float32),
    "in place": lambda h: F.relu(h, inplace=True),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_autograd_does_not_see_stops_deriving(change, read):
    def between(h):
        CHANGES[change](h)
        return READS[read](h)

    assert_left_alone(Normed(between), "does not see it")


def test_changes_that_autograd_records_are_derived_across():
    def between(h):
        gate = (h * 1.5).add_(1).mul_(2)
        whole = torch.zeros_like(h)
        whole[:1], whole[1:] = gate[:1], gate[1:]
        whole += h
        return whole * F.silu(gate)

    assert_alike(*twins(Normed(between)))


def test_convolutions_with_everything_in_place():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            for convolution, norm in zip(self.convolutions, self.norms, strict=True):
                y = norm(convolution(x))
                y += x
                x = F.silu(norm(convolution(F.relu(y, inplace=True))), inplace=True)
            return self.convolutions[0](x)

    images = torch.randn(2, 4, 16, 16)
    stock, ours = twins(Residual(), (images,))
    assert_alike(stock, ours, lambda model: model(images).square().mean().backward())
    for expected, found in zip(stock.buffers(), ours.buffers(), strict=True):
        assert torch.equal(expected, found)


# --- how often and how far backward goes ----------------------------------------------------------------


def test_backward_twice_and_for_some_alone():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))

    def train(model):
        loss = model(X, MASK).square().mean()
        loss.backward(retain_graph=True)
        torch.autograd.grad(loss, [model.blocks[0].q.weight], retain_graph=True)
        torch.autograd.grad(loss, [model.blocks[1].gate.weight, model.norm.weight], retain_graph=True)
        loss.backward()

    assert_alike(stock, ours, train)


def test_a_gradient_penalty():
    stock, ours = twins(Net(), (X, MASK))

    def train(model):
        x = X.clone().requires_grad_()
        loss = model(x, MASK).square().mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()

    assert_alike(stock, ours, train)
    inverted = copy.deepcopy(stock)
    invact.patch(inverted, (X, MASK))
    expected = gradients(stock, train)
    for name, gradient in gradients(inverted, train).items():
        assert gradient is None or (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-8


class Breaking(torch.autograd.Function):
    broken = False

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Breaking.broken:
            raise ArithmeticError
        return gradient


def test_a_backward_that_broke_off_leaves_nothing_to_the_next(monkeypatch):
    stock, ours = twins(Normed(lambda h: h + Breaking.apply(torch.sin(h)) * torch.cos(h)))

    def train(model):
        loss = model(X).square().mean()
        monkeypatch.setattr(Breaking, "broken", True)
        with pytest.raises(ArithmeticError):
            loss.backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        monkeypatch.setattr(Breaking, "broken", False)
        loss.backward()

    assert_alike(stock, ours, train)


def _norms_run(call):
    class Counter(TorchDispatchMode):
        norms = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.norms += func.overloadpacket is torch.ops.aten.native_layer_norm
            return func(*args, **(kwargs or {}))

    with Counter() as counter:
        call()
    return counter.norms


def test_what_q_k_and_v_want_is_made_once_and_let_go():
    _, ours = twins(Net())
    loss = ours(X).square().mean()
    assert _norms_run(lambda: loss.backward(retain_graph=True)) == 3  # two blocks and the last norm
    assert _norms_run(lambda: torch.autograd.grad(loss, [ours.blocks[1].q.weight], retain_graph=True)) == 2
    assert not [each for each in gc.get_objects() if type(each) is shared.Shared and each.tensor is not None]


def test_several_forwards_before_one_backward():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))
    assert_alike(stock, ours, lambda m: (m(X, MASK) + m(2 * X, MASK) * m(X)).square().mean().backward())


def test_a_block_used_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            block = Block()
            self.blocks = nn.Sequential(block, nn.Linear(WIDTH, WIDTH), block)

        def forward(self, x):
            return self.blocks(x)

    assert_alike(*twins(Shared()))


# --- hooks of others, and none --------------------------------------------------------------------------


def test_saved_on_the_cpu_from_outside():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))

    def train(model):
        with torch.autograd.graph.save_on_cpu():
            loss = model(X, MASK).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()

    assert_alike(stock, ours, train)


def test_saved_on_the_cpu_inside():
    def run(block, *args):
        with torch.autograd.graph.save_on_cpu():
            return block(*args)

    assert_alike(*twins(Net(dropout=0.1, run=run), (X, MASK)), masked_step)


def test_hooks_outside_see_fewer_bytes_and_may_change_where_they_are():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))
    before, after = bytes_outside(masked_step, stock, ours)
    assert after < 0.8 * before

    def train(model):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True).copy(), torch.from_numpy):
            loss = model(X, MASK).square().mean()
        loss.backward()

    assert_alike(stock, ours, train)


def test_where_hooks_are_forbidden_it_stands_aside():
    stock, ours = twins(Net())

    def train(model):
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            step(model)

    assert_alike(stock, ours, train)


def _forbidding(model, h):
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return h + 1


def _slope(model, h):
    return torch.func.grad(lambda x: model.norm(x).square().sum())(h)


@pytest.mark.parametrize("inside", [_forbidding, _slope])
def test_a_model_that_forbids_hooks_inside_is_planned_and_not_derived(inside):
    class Forbidding(Normed):
        def forward(self, x):
            return inside(self, super().forward(x))

    assert_left_alone(Forbidding(), "torch.func")


def test_vmap_and_jvp_inside():
    class Mapped(Net):
        def forward(self, x, mask=None):
            x = torch.func.vmap(self.norm)(super().forward(x))
            y, tangent = torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))
            return self.last(y + tangent)

    assert_alike(*twins(Mapped()))


def test_transforms_over_a_patched_model():
    stock, ours = twins(Net())
    found = []
    for model in (stock, ours):

        def loss(parameters, x, model=model):
            return torch.func.functional_call(model, parameters, (x,)).square().mean()

        parameters = dict(model.named_parameters())
        each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
        found.append([*torch.func.grad(loss)(parameters, X).values(), *each.values()])
        found[-1].append(torch.func.jvp(model, (X,), (X,))[1])
    assert all(torch.equal(expected, ours) for expected, ours in zip(*found, strict=True))


def test_forward_derivatives_of_gradients_and_gradients_in_a_batch():
    stock, ours = twins(Normed(lambda h: torch.sin(torch.tanh(h))))
    for model in (stock, ours):
        model.norm = nn.Identity()  # whose gradient has no forward derivative
    found = []
    for model in (stock, ours):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(X.clone().requires_grad_(), torch.ones_like(X))
            (gradient,) = torch.autograd.grad(model(x).square().sum(), model.last.weight)
            found.append([forward_ad.unpack_dual(gradient).tangent])
        losses = model(X).square().mean((1, 2))
        found[-1] += torch.autograd.grad(losses, [model.first.weight], torch.eye(len(X)), is_grads_batched=True)
    assert all(torch.equal(expected, ours) for expected, ours in zip(*found, strict=True))


# --- checkpointing --------------------------------------------------------------------------------------


def _checkpointed(reentrant, **options):
    return lambda block, *args: checkpoint(block, *args, use_reentrant=reentrant, **options)


def _from_a_leaf(model):
    model(X.clone().requires_grad_(), MASK).square().mean().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_inside(reentrant):
    assert_alike(*twins(Net(dropout=0.1, run=_checkpointed(reentrant)), (X, MASK)), _from_a_leaf)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant):
    stock, ours = twins(Net(dropout=0.1), (X, MASK))

    def train(model):
        checkpoint(model, X.clone().requires_grad_(), MASK, use_reentrant=reentrant).square().mean().backward()

    assert_alike(stock, ours, train)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_sequence_checkpointed_in_parts(reentrant):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block(0.1) for _ in range(3)])

        def forward(self, x):
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=reentrant)

    stock, ours = twins(Sequence())
    assert_alike(stock, ours, lambda model: model(X.clone().requires_grad_()).square().mean().backward())


def test_a_region_run_anew_twice_to_its_end_and_in_a_region():
    def train(model):
        with set_checkpoint_early_stop(False):
            loss = model(X, MASK).square().mean()
            loss.backward(retain_graph=True)
            loss.backward()

    stock, ours = twins(Net(dropout=0.1, run=_checkpointed(False)), (X, MASK))
    assert_alike(stock, ours, train)
    assert_alike(stock, ours, lambda model: checkpoint(model, X, MASK, use_reentrant=False).square().mean().backward())


def test_a_gradient_penalty_through_regions():
    stock, ours = twins(Net(run=_checkpointed(False)), (X, MASK))

    def train(model):
        x = X.clone().requires_grad_()
        loss = model(x, MASK).square().mean()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + slope.square().sum()).backward()

    assert_alike(stock, ours, train)


def test_what_all_regions_read_is_kept_in_each_of_them():
    """A context that every block attends to: a handle from another region would have that one run anew too early."""

    class Decoder(Net):
        def forward(self, x, mask=None):
            x, context = self.first(x), self.norm(self.last(x))
            for block in self.blocks:
                x = checkpoint(block, x, mask, context=context, use_reentrant=False)
            return self.last(self.norm(x))

    assert_alike(*twins(Decoder(dropout=0.1), (X, MASK)), masked_step)


@pytest.mark.parametrize("inside", [True, False])
def test_selective_checkpointing(inside):
    contexts = functools.partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
    run = _checkpointed(False, context_fn=contexts)
    stock, ours = twins(Net(dropout=0.1, run=run if inside else None), (X, MASK))

    def around(model):
        run(model, X, MASK).square().mean().backward()

    assert_alike(stock, ours, masked_step if inside else around)


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once, of all that operators made inside."""

    def __init__(self):
        super().__init__()
        self.most, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        alive = {key: (ref, size) for key, (ref, size) in self._storages.items() if not ref.expired()}
        self._storages, self.most = alive, max(self.most, sum(size for _, size in alive.values()))
        return out


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_region_run_anew_keeps_less(reentrant):
    stock, ours = twins(Net(run=_checkpointed(reentrant)), (X, MASK))
    most = []
    for model in (stock, ours):
        loss = model(X.repeat(8, 1, 1).requires_grad_(), MASK.repeat(8, 1, 1)).square().mean()
        with LiveBytes() as alive:
            loss.backward()
        most.append(alive.most)
    assert most[1] < 0.9 * most[0]


# --- autocast -------------------------------------------------------------------------------------------


def test_autocast_around_forward_around_backward_and_around_both():
    stock, ours = twins(Net(dropout=0.1), (X, MASK))
    for forward, backward in ((True, False), (False, True), (True, True)):

        def train(model, forward=forward, backward=backward):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                loss = model(X, MASK).float().square().mean()
            with torch.autocast("cpu", torch.bfloat16, enabled=backward):
                loss.backward()

        assert_alike(stock, ours, train)


def test_autocast_on_and_off_within_a_model():
    def run(block, x, mask):
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.is_autocast_enabled("cpu")):
            return block(x.float(), mask).float()

    stock, ours = twins(Net(dropout=0.1, run=run), (X, MASK))
    assert_alike(stock, ours, masked_step)
    with torch.autocast("cpu", torch.bfloat16):
        assert_alike(stock, ours, lambda model: model(X, MASK).float().square().mean().backward())


def test_a_scaled_loss():
    models = twins(Net())
    for model in models:
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.01), torch.amp.GradScaler("cpu")
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(X).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


# --- ends of all kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_forward_leaves_no_hooks(error):
    class Failing(Net):
        fails = False

        def forward(self, x, mask=None):
            x = super().forward(x, mask)
            if self.fails:
                raise error
            return x

    stock, ours = twins(Failing())
    ours.fails = True
    with pytest.raises(error):
        ours(X)
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    ours.fails = False
    assert_alike(stock, ours)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_graph_that_is_dropped_is_freed_at_once(exact, checkpointed, monkeypatch):
    class Curves(Net):
        def forward(self, x, mask=None):
            x = super().forward(x, mask)
            y = torch.exp(-x.sigmoid())
            return self.last(y.tanh() * F.relu(F.gelu(y)).add(1).sqrt())

    model = Curves(dropout=0.1, run=_checkpointed(False) if checkpointed else None)
    invact.patch(model, (X, MASK), exact=exact)
    made, init = [], handles.Kept.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(handles.Kept, "__init__", noted)
    places = []
    enter = hooks.Deriving.__enter__
    monkeypatch.setattr(hooks.Deriving, "__enter__", lambda self: places.append(weakref.ref(self)) or enter(self))
    gc.collect()
    gc.disable()
    try:
        y = model(X, MASK)
        assert made
        assert places
        del y
        assert not [each for each in (*made, *places) if each() is not None]
        assert not masks._MASKS
        assert not len(handles._READ)
    finally:
        gc.enable()


def test_two_models_in_two_threads_and_backward_in_another():
    wrong = []

    def train(model):
        loss = model(X, MASK).square().mean()
        other = threading.Thread(target=loss.backward)
        other.start()
        other.join()

    def run(model):
        try:
            for _ in range(3):
                for name, gradient in gradients(model, masked_step).items():
                    assert gradient is None or torch.equal(gradient, expected[name])
        except BaseException as error:
            wrong.append(error)

    stock, ours = twins(Net(), (X, MASK))
    assert_alike(stock, ours, train)
    expected = gradients(stock, masked_step)
    threads = [threading.Thread(target=run, args=(model,)) for model in (ours, copy.deepcopy(ours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_train_alike_and_a_pickle_is_stock():
    stock, ours = twins(Net(run=plain))
    assert_alike(stock, copy.deepcopy(ours))
    read = pickle.loads(pickle.dumps(ours))
    assert type(read) is Net
    assert_alike(stock, read)


# --- compilers ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_traced_and_exported():
    stock, ours = twins(Net(run=plain))
    expected = stock(X)
    assert torch.equal(torch.jit.trace(ours, (X,))(X), expected)
    assert torch.allclose(torch.export.export(ours, (X,)).module()(X), expected, atol=1e-6)


def test_compiled_whole_and_in_part():
    stock, ours = twins(Net())
    compiled = [torch.compile(model, backend="aot_eager", fullgraph=True) for model in (stock, ours)]
    assert_alike(*compiled)
    stock, ours = twins(Net())
    for model in (stock, ours):
        model.blocks[0].compile(backend="aot_eager")
    assert_alike(stock, ours)
    before, after = bytes_outside(step, stock, ours)
    assert after < before


# --- functions of others that write ---------------------------------------------------------------------


class Overwriting(torch.autograd.Function):
    """Its backward writes over what it kept, as those of Unsloth and Liger do in kernels that autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = gradient * x.cos()
        x.detach().numpy()[...] = 7
        return slope


class OverwritingByOperators(Overwriting):
    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = gradient * x.cos()
        x.mul_(0)
        return slope


# Such that in stock PyTorch nobody reads afterwards what is written into.
USES = {
    "norm before": lambda m, x, write: write(m.norm(x)) + m.last(m.norm(x)),
    "norm after": lambda m, x, write: m.last(m.norm(x) * 1.5) + write(m.norm(x)),
    "shared norm": lambda m, x, write: (lambda h: m.last(write(h)) + m.second(h))(m.norm(x)),
    "residual": lambda m, x, write: (lambda h: m.last(m.norm(h * 2)) + m.second(write(h)))(m.first(x)),
    "gate": lambda m, x, write: (lambda g: m.second(write(F.silu(g)) * m.last(x)) + m.last(F.silu(g)))(m.first(x)),
}


@pytest.mark.parametrize("function", [Overwriting, OverwritingByOperators])
@pytest.mark.parametrize("use", USES)
def test_functions_that_write_into_what_they_keep(use, function):
    class Using(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
            self.norm = nn.LayerNorm(WIDTH)

        def forward(self, x):
            return USES[use](self, self.first(x), function.apply)

    assert_alike(*twins(Using()))


def test_a_recipe_reads_what_a_function_has_kept_and_written_into():
    """In stock PyTorch the function alone keeps the tensor, and may do with it what it likes."""

    class Two(Normed):
        def forward(self, x):
            h = self.first(x)
            return Overwriting.apply(h), self.last(self.norm(h * 2)), h

    def train(model):
        written, other, h = model(X)
        torch.autograd.grad(written.sum(), h)
        other.square().mean().backward()

    assert_alike(*twins(Two()), train)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_functions_that_change_what_they_are_given():
    stock = Normed(lambda h: F.silu(Doubled.apply(h)))
    ours = copy.deepcopy(stock)
    invact.patch(ours, (X,), exact=True)
    assert_alike(stock, ours)


class Scaled(torch.autograd.Function):
    """Reads an attribute of a tensor that it kept, and keeps a sparse one."""

    @staticmethod
    def forward(ctx, x, scale, matrix):
        ctx.save_for_backward(scale, matrix)
        return torch.sparse.mm(matrix, x) * scale.factor

    @staticmethod
    def backward(ctx, gradient):
        scale, matrix = ctx.saved_tensors
        return torch.sparse.mm(matrix.t(), gradient * scale.factor), None, None


def test_functions_that_keep_tensors_of_other_kinds():
    class Scaling(Normed):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)

        def forward(self, x):
            self.scale.factor = 3.0
            matrix = torch.eye(WIDTH).to_sparse()
            return super().forward(Scaled.apply(self.first(x), self.scale, matrix))

    x = torch.randn(WIDTH, WIDTH)
    stock, ours = twins(Scaling(), (x,))
    assert_alike(stock, ours, lambda model: model(x).square().mean().backward())
