"""Patched models in the loops people train in: the gradients are the stock ones, and what was saved stays saved."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import invact
from invact.swapping.inversion import Inverted

WIDTH, HIDDEN, ROWS = 16, 64, 8
# Bytes that inverting one call frees in fp32: the input, less one bit per element.
FREED = ROWS * HIDDEN * 4 - ROWS * HIDDEN // 8


class Feed(nn.Module):
    """One activation that is a module and one that is an expression, both between linear layers."""

    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
        self.norm, self.up2, self.down2 = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        x = x + self.down(self.act(self.up(x)))
        return x + self.down2(F.silu(self.up2(self.norm(x))))


class Stack(nn.Module):
    """Two blocks, each under gradient checkpointing if `reentrant` is not None."""

    def __init__(self, blocks=2, reentrant=None):
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Feed() for _ in range(blocks))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def rows(n=ROWS):
    return torch.randn(n, WIDTH)


def stock_and_patched(model, x, sites=4, **options):
    """A copy of the model as it was, and the model patched."""
    stock = copy.deepcopy(model)
    report = invact.patch(model, (x,), **options)
    assert len(report.inverted) == sites
    return stock, model, report


def loss_of(output):
    return output.float().square().mean() + output.float().sin().mean()


def train_once(model, x):
    loss_of(model(x)).backward()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(patched, stock, tolerance=1e-5):
    ours, theirs = gradients(patched), gradients(stock)
    assert list(ours) == list(theirs)
    assert ours
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-7, name


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


# --- gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointed_blocks_get_the_stock_gradients_and_hold_nothing_between(reentrant, count_kept):
    x = rows()
    stock, patched, report = stock_and_patched(Stack(reentrant=reentrant), x)
    plain = copy.deepcopy(stock)
    plain.reentrant = None
    for model in (plain, stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)
    assert_same_gradients(patched, plain)
    assert report.bytes_before == report.bytes_after == count_kept(stock, (x,)) == count_kept(patched, (x,))


def test_recomputing_a_checkpointed_block_keeps_less():
    x = rows()
    stock, patched, report = stock_and_patched(Stack(blocks=1, reentrant=True), x, sites=2)

    def kept_in_backward(model):
        loss, held = loss_of(model(x)), []

        def pack(tensor):
            held.append(tensor.detach())
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(nbytes for address, nbytes in storages.items() if address not in weights)

    freed = kept_in_backward(stock) - kept_in_backward(patched)
    assert freed == 2 * FREED == sum(site.bytes_saved for site in report.inverted)


def test_an_activation_checkpointed_by_itself_gets_the_stock_gradient():
    class OnlyTheActivation(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
            self.reentrant = reentrant

        def forward(self, x):
            return self.down(checkpoint(self.act, self.up(x), use_reentrant=self.reentrant))

    for reentrant in (True, False):
        model, x = OnlyTheActivation(reentrant), rows()
        stock = copy.deepcopy(model)
        report = invact.patch(model, (x,))
        assert report.bytes_after <= report.bytes_before
        for each in (stock, model):
            train_once(each, x)
        assert_same_gradients(model, stock)


@pytest.mark.parametrize("patch_first", [False, True], ids=["enabled, then patched", "patched, then enabled"])
def test_hugging_face_checkpointing_enabled_before_or_after_patching(patch_first):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16, use_cache=False)
    ids = {"input_ids": torch.randint(0, 50, (2, 16))}
    model = GPT2LMHeadModel(config).train()
    stock = copy.deepcopy(model)
    for reentrant in (True, False):
        enable = partial(model.gradient_checkpointing_enable, {"use_reentrant": reentrant})
        if patch_first:
            report = invact.patch(model, ids)
            enable()
        else:
            enable()
            report = invact.patch(model, ids)
        assert len(report.inverted) == 2
        for each in (stock, model):
            each.zero_grad()
            torch.manual_seed(0)
            loss_of(each(**ids).logits).backward()
        assert_same_gradients(model, stock)
        invact.unpatch(model)
        model.gradient_checkpointing_disable()


def test_selective_checkpointing_may_save_the_output_of_the_activation():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def keep_products(ctx, op, *args, **kwargs):
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    class Selective(Stack):
        def forward(self, x):
            contexts = partial(create_selective_checkpoint_contexts, keep_products)
            x = self.embed(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            return self.head(x)

    x = rows()
    stock, patched, _ = stock_and_patched(Selective(), x)
    for model in (stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)


# --- torch.compile ------------------------------------------------------------------------------------


# Inductor's own choice of what to keep for backward, without the minutes that its C++ takes to compile.
PARTITIONED = "aot_eager_decomp_partition"


def kept_by_call(call, model):
    """Bytes of the storages that `call` keeps for backward, the model's own left out; and what it returned."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = []

    def pack(tensor):
        held.append(tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(nbytes for address, nbytes in storages.items() if address not in own), output


class OneModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class OneExpression(OneModule):
    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("kind", [OneModule, OneExpression])
@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled_in_one_graph_the_saving_remains_and_the_gradients_are_the_stock_ones(kind, backend):
    torch._dynamo.reset()
    x = rows()
    stock, patched, _ = stock_and_patched(kind(), x, sites=1)
    kept = []
    for model in (stock, patched):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        nbytes, output = kept_by_call(lambda compiled=compiled: compiled(x), model)
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(patched, stock)
    assert kept[0] - kept[1] == FREED


@pytest.mark.parametrize("kind", [OneModule, OneExpression])
@pytest.mark.parametrize("in_place", [True, False], ids=["model.compile()", "torch.compile(model)"])
def test_a_model_compiled_before_can_be_patched_and_unpatched_and_follows(kind, in_place):
    torch._dynamo.reset()
    model, x = kind(), rows()
    stock = copy.deepcopy(model)
    train_once(stock, x)
    options = {"backend": "inductor", "fullgraph": True}
    compiled = model if in_place else torch.compile(model, **options)
    if in_place:
        model.compile(**options)
    stock_bytes, _ = kept_by_call(lambda: compiled(x), model)
    assert len(invact.patch(compiled, (x,)).inverted) == 1
    patched_bytes, output = kept_by_call(lambda: compiled(x), model)
    loss_of(output).backward()
    assert_same_gradients(model, stock)
    assert stock_bytes - patched_bytes == FREED
    assert invact.unpatch(compiled) == 1
    assert kept_by_call(lambda: compiled(x), model)[0] == stock_bytes


class WithGate(OneModule):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class WithNorm(OneModule):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x):
        return self.down(self.norm(self.act(self.up(x))))


@pytest.mark.parametrize("kind", [WithGate, WithNorm])
def test_where_the_compiler_recomputes_the_output_itself_patching_saves_nothing_and_costs_nothing(kind):
    """Stock compiled code keeps only x where the output goes to pointwise operations; then there is nothing to win."""
    torch._dynamo.reset()
    x = rows()
    stock, patched, report = stock_and_patched(kind(), x, sites=1)
    assert report.bytes_before - report.bytes_after == FREED  # in eager mode
    kept = []
    for model in (stock, patched):
        compiled = torch.compile(model, fullgraph=True, backend=PARTITIONED)
        nbytes, output = kept_by_call(lambda compiled=compiled: compiled(x), model)
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(patched, stock)
    assert kept[1] <= kept[0]


@pytest.mark.slow
def test_compiled_by_inductor_under_autocast_a_transformer_keeps_its_saving():
    from transformers import BertConfig, BertModel

    torch._dynamo.reset()
    config = BertConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model, ids = BertModel(config, add_pooling_layer=False).train(), torch.randint(0, 50, (2, 16))
    stock = copy.deepcopy(model)
    report = invact.patch(model, {"input_ids": ids}, autocast=torch.bfloat16)
    kept = []
    for each in (stock, model):
        compiled = torch.compile(each, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            nbytes, output = kept_by_call(
                lambda compiled=compiled: compiled(input_ids=ids).last_hidden_state.square(), each
            )
        loss_of(output).backward()
        kept.append(nbytes)
    assert_same_gradients(model, stock, tolerance=3e-2)
    assert kept[0] - kept[1] == sum(site.bytes_saved for site in report.inverted)


# --- adapters and wrappers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("patch_first", [False, True], ids=["adapted, then patched", "patched, then adapted"])
def test_lora_on_frozen_layers(dropout, patch_first, count_kept):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    x = rows()
    lora = LoraConfig(target_modules=["up", "down", "up2", "down2"], lora_dropout=dropout, r=4, init_lora_weights=False)
    base = Stack()
    torch.manual_seed(1)
    stock = get_peft_model(copy.deepcopy(base), lora)
    kept = count_kept(stock, (x,))
    if patch_first:
        assert len(invact.patch(base, (x,)).inverted) == 4
    torch.manual_seed(1)
    model = get_peft_model(base, lora)
    if not patch_first:
        report = invact.patch(model, (x,))
        assert (report.bytes_before, report.bytes_after) == (kept, count_kept(model, (x,)))
        assert report.bytes_after <= report.bytes_before
        assert len(report.inverted) == (4 if dropout == 0.0 else 0)
    for each in (stock, model):
        torch.manual_seed(0)
        train_once(each, x)
    assert_same_gradients(model, stock)
    assert all("lora" in name for name in gradients(model))


def test_merging_lora_into_a_patched_model():
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    x, base = rows(), Stack()
    model = get_peft_model(base, LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False))
    invact.patch(model, (x,))
    expected = model(x)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    assert invact.unpatch(merged) == 2  # the sites before the adapted layers alone


@pytest.fixture
def accelerator_of():
    """Accelerators of other settings one after another: accelerate keeps those of the first for the process."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield lambda precision: Accelerator(cpu=True, mixed_precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("patch_first", [False, True], ids=["prepared, then patched", "patched, then prepared"])
def test_accelerate_prepares_a_patched_model_and_a_prepared_one_is_patched(precision, patch_first, accelerator_of):
    x, accelerator = rows(), accelerator_of(precision)
    autocast = torch.bfloat16 if precision == "bf16" else None
    model = Stack()
    stock = copy.deepcopy(model)
    if patch_first:
        assert len(invact.patch(model, (x,), autocast=autocast).inverted) == 4
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0))
    if not patch_first:
        assert len(invact.patch(prepared, (x,), autocast=autocast).inverted) == 4
    with accelerator.accumulate(prepared):
        accelerator.backward(loss_of(prepared(x)))
        accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
        optimizer.step()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast is not None):
        output = stock(x)
    loss_of(output).backward()
    assert_same_gradients(prepared, stock, tolerance=1e-5 if autocast is None else 2e-2)
    assert invact.unpatch(accelerator.unwrap_model(prepared)) == 4


def test_the_expression_of_a_forward_that_accelerate_wrapped_is_given_back_after_unwrapping(accelerator_of):
    model, x = OneExpression(), rows()
    stock = copy.deepcopy(model)
    train_once(stock, x)
    invact.patch(model, (x,), autocast=torch.bfloat16)
    accelerator = accelerator_of("bf16")
    prepared = accelerator.prepare(model)
    model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert invact.unpatch(model) == 1
    kept, output = kept_by_call(lambda: model(x), model)
    loss_of(output).backward()
    assert torch.equal(model.up.weight.grad, stock.up.weight.grad)
    assert kept == kept_by_call(lambda: stock(x), stock)[0]


def test_unpatching_a_prepared_model_gives_back_the_expression_of_its_outermost_forward(accelerator_of):
    model, x = OneExpression(), rows()
    stock = copy.deepcopy(model)
    invact.patch(model, (x,))
    prepared = accelerator_of("bf16").prepare(model)
    assert invact.unpatch(prepared) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = kept_by_call(lambda: stock(x), stock)[0]
    assert kept_by_call(lambda: prepared(x), prepared)[0] == expected


# --- copies, files, graphs ----------------------------------------------------------------------------


def test_a_moving_average_copy_of_a_patched_model_averages_and_runs():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    averages = []
    for model in (stock, patched):
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            train_once(model, x)
            optimizer.step()
            average.update_parameters(model)
        averages.append(average.eval())
    torch.testing.assert_close(averages[1](x), averages[0](x), rtol=1e-5, atol=1e-6)
    train_once(averages[1].train(), x)  # a copy that is trained must not send gradients to its model
    assert averages[1].module.embed.weight.grad is not None
    assert invact.unpatch(averages[1]) == 4
    assert invact.unpatch(patched) == 4


def test_state_dicts_go_both_ways_between_patched_and_stock():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    fresh = Stack()
    assert not any(fresh.load_state_dict(patched.state_dict()))
    torch.testing.assert_close(fresh(x), stock(x), rtol=0, atol=0)
    other = Stack()
    assert not any(patched.load_state_dict(other.state_dict()))
    for model in (patched, other):
        train_once(model, x)
    assert_same_gradients(patched, other)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_whole_model_saved_while_patched_loads_trains_and_can_be_patched_again():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    loaded = saved_and_loaded(patched)
    for model in (loaded, stock):
        train_once(model, x)
    assert_same_gradients(loaded, stock)
    invact.unpatch(loaded)
    assert len(invact.patch(loaded, (x,)).inverted) == 4
    assert patched.blocks[0].up.weight.grad is None


def test_exported_in_evaluation_mode_a_patched_model_is_the_stock_graph():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    graphs = [torch.export.export(model.eval(), (x,)) for model in (stock, patched)]
    targets = [[node.target for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert targets[0] == targets[1]
    assert torch.equal(graphs[1].module()(x), stock(x))


def test_traced_in_evaluation_mode_a_patched_model_computes_the_same():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    with torch.no_grad():
        traced = torch.jit.trace(patched.eval(), (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), stock.eval()(x))


def test_traced_in_training_mode_a_patched_model_is_the_stock_one():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    traced = torch.jit.trace(patched, (x,))
    traced(x).square().sum().backward()
    stock(x).square().sum().backward()
    for ours, own in zip(traced.parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours.grad, own.grad)


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


def test_a_tower_under_no_grad_is_left_alone_and_the_other_is_patched(count_kept):
    class TwoTowers(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.text = Stack(), Stack()

        def forward(self, x):
            with torch.no_grad():
                locked = self.image(x)
            return locked @ self.text(x).T

    x = rows()
    stock, patched, report = stock_and_patched(TwoTowers(), x)
    assert all(site.path.startswith("text.") for site in report.inverted)
    assert {s.reason for s in report.sites if s.path.startswith("image.")} == {"no gradient flows through it here"}
    for model in (stock, patched):
        train_once(model, x)
    assert_same_gradients(patched, stock)
    assert report.bytes_after == count_kept(patched, (x,))


def test_a_locked_open_clip_image_tower_is_left_alone(count_kept):
    import open_clip

    model = open_clip.model.CLIP(
        32, {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2},
    )  # fmt: skip
    inputs = {"image": torch.randn(2, 3, 16, 16), "text": torch.randint(1, 20, (2, 8))}
    for unlocked, sites in ((0, 2), (2, 3)):
        locked = copy.deepcopy(model)
        locked.lock_image_tower(unlocked_groups=unlocked)
        stock = copy.deepcopy(locked)
        report = invact.patch(locked, inputs)
        assert len(report.inverted) == sites
        assert (report.bytes_before, report.bytes_after) == (count_kept(stock, inputs), count_kept(locked, inputs))
        for each in (stock, locked):
            image, text, scale = each(**inputs)
            (scale * image @ text.T).square().mean().backward()
        assert_same_gradients(locked, stock)


def test_layers_frozen_after_planning_still_get_right_gradients_elsewhere():
    x = rows()
    stock, patched, _ = stock_and_patched(Stack(), x)
    for model in (stock, patched):
        model.embed.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        model.blocks[1].down.requires_grad_(False)
        train_once(model, x)
    assert_same_gradients(patched, stock)


def test_frozen_layers_decide_site_by_site(count_kept):
    model, x = Stack(), rows()
    model.blocks[0].requires_grad_(False)  # nobody keeps what its activations give
    model.blocks[1].down2.requires_grad_(False)
    report = invact.patch(model, (x,))
    assert [site.path for site in report.inverted] == ["blocks.1.act"]
    assert report.bytes_after == count_kept(model, (x,))


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
