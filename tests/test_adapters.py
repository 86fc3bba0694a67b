"""Adapters in the dry run: PEFT's own, a base in 4 bits by its bytes, and what does not go, in one sentence."""

import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import invact
from invact.cli import app
from invact.fitting.simulated_training import simulated_training
from invact.ledger.ledger import Ledger
from invact.patchers import (
    AdapterError,
    MissingLibraryError,
    example_inputs,
    library_of,
    load,
    quantized,
    with_4bit_base,
    with_lora,
)
from invact.planning.plans import decide_for_device
from invact.simulation.setting import Setting

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]


def llama(device, dtype=torch.bfloat16):
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2(device, dtype=torch.bfloat16):
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, n_positions=64, use_cache=False)
    with torch.device(device):
        return transformers.GPT2LMHeadModel(config).to(dtype)


def bytes_in_4bit(numel):
    """Half a byte a weight, a byte for 64 and four for 16,384."""
    scales = -(-numel // 64)
    return numel // 2 + scales + 4 * -(-scales // 256)


IDS = {"input_ids": torch.arange(2 * 64).view(2, 64) % 90}


def counted_in_a_real_pass(model):
    """The ledger's count of a forward on the CPU, which must run backward as well."""
    with Ledger(model) as ledger:
        output = model(**IDS)
    total = ledger.memory().total_bytes
    output.logits.float().mean().backward()
    return total


@pytest.mark.parametrize(
    ("base", "dropout", "in_4bit"), [(llama, 0.05, False), (llama, 0.0, True), (gpt2, 0.0, False), (gpt2, 0.05, True)]
)
def test_bytes_said_of_shapes_are_those_of_a_real_step_before_and_after(base, dropout, in_4bit):
    def adapted(device):
        model = base(device)
        return with_lora(with_4bit_base(model) if in_4bit else model, 8, dropout)

    said = decide_for_device(adapted("meta"), IDS, device="cpu").report
    model = adapted("cpu")
    assert counted_in_a_real_pass(model) == pytest.approx(said.bytes_before, rel=0.01)
    invact.patch(model, IDS)
    assert counted_in_a_real_pass(model) == pytest.approx(said.bytes_after, rel=0.01)
    assert said.bytes_after < 0.7 * said.bytes_before


def test_only_the_adapters_train_and_lie_on_no_device():
    model = with_lora(llama("meta"), 4, 0.1)
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert model.training
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}  # as PEFT has it over 16 bits
    assert sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules()) == 7


def test_adapters_are_those_that_peft_makes():
    ours = with_lora(llama("meta"), 4, 0.1, ["q_proj", "v_proj"])
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(llama("cpu"), config)
    described = [
        [(name, p.shape, p.dtype, p.requires_grad) for name, p in m.named_parameters()] for m in (ours, theirs)
    ]
    assert described[0] == described[1]


def test_optimiser_states_are_counted_of_what_trains():
    model = with_lora(llama("meta"), 4)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(2 * p.numel() for p in model.parameters() if not p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    setting = Setting(torch.device("cuda"))
    with simulated_training(model, IDS, setting, "adamw") as take_step:
        step = take_step()
    assert step.weights == trained + frozen + buffers
    assert step.held.states == pytest.approx(2 * trained, rel=1e-2)  # besides them, a number for each parameter


def test_weights_in_4_bits_have_their_bytes_and_the_output_embeddings_keep_theirs():
    base = llama("meta")
    linear = {path: m.weight.numel() for path, m in base.named_modules() if isinstance(m, nn.Linear)}
    model = with_4bit_base(base)
    for path, numel in linear.items():
        layer = model.get_submodule(path)
        own = [*layer.parameters(), *layer.buffers()]
        found = sum(t.numel() * t.element_size() for t in own)
        if path == "lm_head":
            assert (type(layer), found) == (nn.Linear, 2 * numel)
        else:
            assert found == bytes_in_4bit(numel)
            assert not layer.weight.requires_grad


def test_known_models_in_4_bits_are_as_large_as_is_said_of_them():
    model = with_4bit_base(load("meta-llama/Llama-3.1-8B", torch.bfloat16))
    nbytes = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    # 1.05e9 parameters of embeddings in 16 bits, 6.98e9 in 4.127.
    assert nbytes == pytest.approx(2 * 1.0507e9 + 6.9793e9 * 4.127 / 8, rel=1e-3)


def test_conv1d_layers_of_gpt2_are_in_4_bits_too_and_tied_embeddings_are_not():
    model = with_4bit_base(gpt2("meta"))
    assert isinstance(model.transformer.h[0].attn.c_attn, quantized.Linear4bit)
    assert model.transformer.h[0].attn.c_attn.out_features == 3 * 64
    assert model.lm_head.weight.dtype is torch.bfloat16


def test_layer_in_4_bits_keeps_neither_its_input_nor_a_weight_in_16_bits():
    layer = quantized.Linear4bit(nn.Linear(64, 128, dtype=torch.bfloat16))
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    with Ledger(layer) as ledger:
        y = layer(x * 1)
    assert ledger.memory().total_bytes == 0
    y.sum().backward()
    assert (y.shape, y.dtype, x.grad.shape) == ((4, 128), torch.bfloat16, x.shape)
    assert layer.weight.grad is None


@pytest.mark.parametrize("around", [nullcontext, FakeTensorMode])
def test_layer_in_4_bits_runs_forward_and_backward_in_shapes_alone(around):
    with around(), torch.device("meta" if around is nullcontext else "cpu"):
        model = nn.Sequential(quantized.Linear4bit(nn.Linear(64, 128)), nn.Linear(128, 8))
        x = torch.randn(3, 5, 64, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == x.shape
    assert [p.grad is not None for p in model.parameters()] == [False, False, True, True]


def test_model_of_pefts_is_planned_without_inputs():
    model = with_lora(llama("meta"), 8)
    assert library_of(model).name == "transformers"
    shapes = {name: ids.shape for name, ids in example_inputs(model, 2, 16).items()}
    assert shapes == {"input_ids": (2, 16), "labels": (2, 16)}
    assert invact.plan(model).saving > 0


def test_models_of_timm_take_adapters():
    timm = pytest.importorskip("timm")
    model = with_lora(timm.create_model("vit_tiny_patch16_224", depth=1), 4, targets=["qkv"])
    assert library_of(model).name == "timm"
    assert invact.plan(model).bytes_before > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0,), "rank is 0.*Give 1 or more"),
        ((-4,), "rank is -4"),
        ((4, 1.0), "dropout is 1,.*less than 1"),
        ((4, -0.1), "dropout is -0.1"),
        ((4, 0.0, ["q_prj"]), "No layer of LlamaForCausalLM is called q_prj. Its linear layers are q_proj, k_proj"),
        ((4, 0.0, ["q_proj", "nothing"]), "is called nothing"),  # PEFT passes over it
        ((4, 0.0, []), "No layer of LlamaForCausalLM was named"),
        ((4, 0.0, ["input_layernorm"]), "PEFT makes no LoRA adapters for LlamaForCausalLM"),
        ((4, 0.0, "q_proj"), "'q_proj' is no list of names"),
    ],
)
def test_adapters_that_can_not_be_are_refused_in_a_sentence(arguments, words):
    with pytest.raises(AdapterError, match=words):
        with_lora(llama("meta"), *arguments)


def test_model_without_linear_layers_takes_no_adapters():
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        with_lora(nn.Sequential(nn.Conv2d(3, 8, 3)), 4)


def test_models_of_other_libraries_are_not_in_4_bits():
    with pytest.raises(AdapterError, match="transformers does that, for models of its own"):
        with_4bit_base(nn.Sequential(nn.Linear(8, 8)))


def test_missing_peft_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingLibraryError, match=r"pip install 'invact\[lora\]'"):
        with_lora(llama("meta"), 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of one layer, as the command line may be given it."""
    path = tmp_path_factory.mktemp("gpt2")
    gpt2("meta").config.save_pretrained(path)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**fields, "architectures": ["GPT2LMHeadModel"]}))
    return path


def run(directory, *arguments):
    return CliRunner().invoke(app, ["patch", str(directory), "--batch-size", "2", *arguments])


def test_command_counts_adapters_and_says_so_in_its_title(directory):
    result = run(directory, "--lora-rank", "16", "--lora-dropout", "0.05", "--quantize", "4bit", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["title"] == (
        f"{directory} · GPT2LMHeadModel · LoRA rank 16, dropout 0.05, on all linear layers, base in 4 bits · "
        "2 x 64 tokens · bf16"
    )
    assert any("lora_dropout" in tensor["path"] for tensor in report["derived"])


def test_command_fits_more_with_the_base_in_4_bits(directory):
    options = ("--lora-rank", "4", "--lora-targets", "c_attn", "--gpu-memory", "8GiB", "--json")
    command = ["patch", str(directory), *options]
    printed = [CliRunner().invoke(app, [*command, *more]).stdout for more in ([], ["--quantize", "4bit"])]
    fits = [json.loads(text)["fit"] for text in printed]
    in_16_bits, in_4_bits = (fit["needs"]["invact"]["lines"][0][0] for fit in fits)
    quantised = [64 * 3 * 64, 64 * 64, 64 * 4 * 64, 4 * 64 * 64]
    saved = sum(2 * numel - bytes_in_4bit(numel) for numel in quantised)
    assert in_16_bits - in_4_bits == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lora-dropout", "0.1"], "--lora-dropout says how LoRA adapters are to be, and there are none. Add"),
        (["--lora-targets", "c_attn"], "--lora-targets says how LoRA adapters are to be, and there are none. Add"),
        (["--quantize", "4bit"], "Weights in 4bit do not train by themselves. Add adapters that do, as in --lora-rank"),
        (["--lora-rank", "0"], "The LoRA rank is 0, and an adapter of that rank has no weights. Give 1 or more."),
        (["--lora-rank", "4", "--lora-targets", "q_proj"], "No layer of GPT2LMHeadModel is called q_proj."),
    ],
)
def test_command_refuses_in_one_sentence(directory, arguments, words):
    result = run(directory, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output
