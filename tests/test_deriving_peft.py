"""Adapters of PEFT: what is derived gives the gradients of stock PyTorch, bit for bit, and less is kept."""

import copy
import weakref

import pytest
import torch
from torch import nn

import invact

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(config, dtype=torch.bfloat16, width=128, hidden=344, layers=1, **options):
    torch.manual_seed(0)
    base = transformers.MistralConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=128, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = peft.get_peft_model(transformers.MistralForCausalLM(base).to(dtype), config, **options).train()
    for p in model.parameters():
        if p.requires_grad and not p.any():  # adapters begin at zero, and so do half of the gradients
            nn.init.normal_(p, std=0.02)
    return model


def ids(rows=2, length=64):
    return {"input_ids": torch.randint(128, (rows, length))}


def loss_and_gradients(model, inputs, autocast):
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad]


class Held:
    """Goes with the part of the graph that holds it."""

    def __init__(self, tensor):
        self.tensor = tensor


def kept_bytes(model, inputs, autocast=False):
    """Bytes of the storages that one forward keeps, parameters left out."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    held = weakref.WeakSet()

    def pack(tensor):
        kept = Held(tensor.detach())
        held.add(kept)
        return kept

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**inputs)
    storages = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in list(held)}
    del output
    return sum(nbytes for identity, nbytes in storages.items() if identity not in own)


def assert_as_stock(model, autocast, share):
    stock, inputs = copy.deepcopy(model), ids()
    invact.patch(model, inputs, exact=True, autocast=torch.bfloat16 if autocast else None)
    expected, found = (loss_and_gradients(each, inputs, autocast) for each in (stock, model))
    for one, other in zip(expected, found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    kept, before = kept_bytes(model, inputs, autocast), kept_bytes(stock, inputs, autocast)
    share += 0.1 * autocast  # its 16-bit copies of weights are kept as in stock
    assert kept < share * before, (kept, before)


KINDS = {
    "LoRA": (lambda: peft.LoraConfig(r=16, target_modules=LINEAR), 0.6),
    "LoRA with dropout": (lambda: peft.LoraConfig(r=16, target_modules=LINEAR, lora_dropout=0.05), 0.7),
    "rank-stabilised LoRA": (lambda: peft.LoraConfig(r=16, target_modules=LINEAR, use_rslora=True), 0.6),
    "DoRA": (lambda: peft.LoraConfig(r=16, target_modules=LINEAR, use_dora=True), 0.85),
    "AdaLoRA": (lambda: peft.AdaLoraConfig(r=8, target_modules=LINEAR, total_step=100), 0.75),
    "IA3": (
        lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        0.65,
    ),
    "prefix tuning": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), 0.9),
    "prompt tuning": (lambda: peft.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), 0.85),
    "LoHa": (lambda: peft.LoHaConfig(r=8, target_modules=LINEAR), 0.85),
    "LoKr": (lambda: peft.LoKrConfig(r=8, target_modules=LINEAR), 0.6),
    "VeRA": (lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]), 0.85),
    "BOFT": (
        lambda: peft.BOFTConfig(boft_block_size=32, boft_block_num=0, target_modules=["q_proj", "v_proj"]),
        0.85,
    ),
    "layer norm tuning": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm"]),
        0.75,
    ),
}


QUICK = ("LoRA", "LoRA with dropout", "AdaLoRA", "IA3")


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in QUICK)) for kind in KINDS])
def test_an_adapter_trains_as_in_stock_and_less_is_kept(kind, autocast):
    config, share = KINDS[kind]
    assert_as_stock(adapted(config()), autocast, share)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_an_adapter_in_the_precision_of_its_base_derives_too(dropout):
    config = peft.LoraConfig(r=16, target_modules=LINEAR, lora_dropout=dropout)
    assert_as_stock(adapted(config, autocast_adapter_dtype=False), False, 0.8)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_an_adapter_of_a_wide_model_derives(autocast):
    config = peft.LoraConfig(r=16, target_modules=LINEAR)
    assert_as_stock(adapted(config, dtype=torch.float32), autocast, 0.8)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_an_adapter_under_gradient_checkpointing_trains_as_in_stock(reentrant):
    model = adapted(peft.LoraConfig(r=16, target_modules=LINEAR), layers=2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_as_stock(model, False, 1.01)


def test_gradient_checkpointing_of_transformers_stays_on_and_its_regions_keep_less_while_they_run_anew():
    model, inputs = adapted(peft.LoraConfig(r=16, target_modules=LINEAR), layers=2), ids()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    stock = copy.deepcopy(model)
    invact.patch(model, inputs, exact=True)
    assert kept_bytes(model, inputs) <= kept_bytes(stock, inputs)
    assert kept_in_regions(model, inputs) < 0.7 * kept_in_regions(stock, inputs)


def kept_in_regions(model, inputs):
    """Bytes that autograd holds when a region has been run anew, in backward."""
    held, most = weakref.WeakSet(), 0
    own = {t.untyped_storage()._cdata for t in model.parameters()}

    def pack(tensor):
        kept = Held(tensor.detach())
        held.add(kept)
        return kept

    def count(grad):
        nonlocal most
        storages = {kept.tensor.untyped_storage() for kept in list(held)}
        most = max(most, sum({s._cdata: s.nbytes() for s in storages if s._cdata not in own}.values()))
        return grad

    loss = model(**inputs, labels=inputs["input_ids"]).loss
    down = model.base_model.model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, args, output: output.register_hook(count) and None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss.backward()
    return most


@pytest.mark.parametrize(
    ("dropout", "autocast", "saving"),
    [(0.05, None, 0.62), (0.05, torch.bfloat16, 0.54), (0.0, None, 0.58), (0.0, torch.bfloat16, 0.50)],
)
def test_lora_of_a_large_model_on_a_gpu_keeps_less_than_half(dropout, autocast, saving):
    base = transformers.MistralConfig(num_hidden_layers=4, use_cache=False, vocab_size=32000)
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(base).to(torch.bfloat16)
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_dropout=dropout, target_modules="all-linear"))
    inputs = {"input_ids": torch.zeros(2, 512, dtype=torch.long)}
    report = invact.planning.plans.decide_for_device(model.train(), inputs, autocast=autocast, exact=True).report
    assert 1 - report.bytes_after / report.bytes_before >= saving, str(report)


class QuantisedProduct(torch.autograd.Function):
    """As bitsandbytes' MatMul4Bit: the weight is dequantised again in backward, and the input is kept as it is."""

    @staticmethod
    def forward(ctx, x, quantised, scale):
        ctx.save_for_backward(quantised, scale)
        return x @ (quantised.to(x.dtype) * scale).t()

    @staticmethod
    def backward(ctx, dy):
        quantised, scale = ctx.saved_tensors
        return dy @ (quantised.to(dy.dtype) * scale), None, None


class QuantisedLinear(nn.Linear):
    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().max() / 7
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return QuantisedProduct.apply(x, self.weight, self.scale.to(x.dtype))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_an_adapter_over_quantised_layers_trains_as_in_stock(dropout):
    model = adapted(peft.LoraConfig(r=16, target_modules=LINEAR, lora_dropout=dropout))
    for module in list(model.modules()):
        if isinstance(module, peft.tuners.lora.Linear):
            module.base_layer = QuantisedLinear(module.base_layer)
    assert_as_stock(model, False, 0.75)
