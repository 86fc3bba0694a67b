"""What is derived is right in every circumstance: a patched model trains as its stock twin does, bit for bit."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from deriving_twins import (
    MASK,
    Net,
    Normed,
    X,
    assert_alike,
    assert_left_alone,
    gradients,
    masked_step,
    plain,
    run_checkpointed,
    step,
    twins,
)
from torch import nn
from torch.autograd import forward_ad

import invact
from invact.deriving import handles, hooks, masks

pytestmark = pytest.mark.usefixtures("one_thread")


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

    model = Curves(dropout=0.1, run=run_checkpointed(False) if checkpointed else None)
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
