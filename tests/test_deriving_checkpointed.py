"""What is derived is right under checkpointing and autocast, of every kind and in every nesting."""

import functools

import pytest
import torch
from deriving_twins import MASK, Block, Net, X, assert_alike, masked_step, run_checkpointed, twins
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

pytestmark = pytest.mark.usefixtures("one_thread")


MATRIX_PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]

# --- checkpointing --------------------------------------------------------------------------------------


def _from_a_leaf(model):
    model(X.clone().requires_grad_(), MASK).square().mean().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_inside(reentrant):
    assert_alike(*twins(Net(dropout=0.1, run=run_checkpointed(reentrant)), (X, MASK)), _from_a_leaf)


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

    stock, ours = twins(Net(dropout=0.1, run=run_checkpointed(False)), (X, MASK))
    assert_alike(stock, ours, train)
    assert_alike(stock, ours, lambda model: checkpoint(model, X, MASK, use_reentrant=False).square().mean().backward())


def test_a_gradient_penalty_through_regions():
    stock, ours = twins(Net(run=run_checkpointed(False)), (X, MASK))

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
    run = run_checkpointed(False, context_fn=contexts)
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
    stock, ours = twins(Net(run=run_checkpointed(reentrant)), (X, MASK))
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
