"""Models by name: real libraries, small configurations, no network."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
import transformers
from huggingface_hub import constants
from published_models import PUBLISHED_PARAMETERS
from small_architectures import TEXT, shapes

from invact import patchers


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def first_tensor(output: object) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


# --- names ------------------------------------------------------------------------------------------------


def test_every_bundled_configuration_has_a_published_size():
    assert {name for name in patchers.huggingface.names() if "/" in name} == PUBLISHED_PARAMETERS.keys()


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_bundled_configuration_has_the_published_number_of_parameters(name):
    if patchers.huggingface.config_fields(name)["model_type"] not in transformers.CONFIG_MAPPING:
        pytest.skip("needs a newer transformers")
    millions = sum(p.numel() for p in patchers.load(name).parameters()) / 1e6
    if name == "google/flan-t5-base" and millions < 223:
        pytest.skip("transformers 5 ties the output layer of T5 v1.1, which was published untied")
    assert millions == pytest.approx(PUBLISHED_PARAMETERS[name], abs=0.051)


@pytest.mark.parametrize(
    ("name", "library", "own_name"),
    [
        ("bert-base-uncased", "transformers", "bert-base-uncased"),
        ("google-bert/bert-base-uncased", "transformers", "google-bert/bert-base-uncased"),
        ("transformers/gpt2", "transformers", "gpt2"),
        ("someone/something", "transformers", "someone/something"),
        ("timm/vit_base_patch16_224", "timm", "vit_base_patch16_224"),
        ("convnext_tiny", "timm", "convnext_tiny"),
        ("open_clip/ViT-B-32", "open_clip", "ViT-B-32"),
        ("ViT-B-32-quickgelu", "open_clip", "ViT-B-32-quickgelu"),
    ],
)
def test_name_goes_to_the_library_that_knows_it(name, library, own_name):
    found, rest = patchers.resolve(name)
    assert (found.name, rest) == (library, own_name)


def test_library_can_be_given_and_then_the_prefix_is_optional():
    assert patchers.resolve("timm/resnet18", "timm") == patchers.resolve("resnet18", "timm")


def test_unknown_library_is_named_with_the_known_ones():
    with pytest.raises(patchers.ModelNameError, match=r"transformers, .*timm"):
        patchers.resolve("resnet18", "somebodys")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("bert-base-uncasd", "bert-base-uncased"),
        ("gpt3", "gpt2"),
        ("vit_base_patch16_225", "timm/vit_base_patch16_224"),
        ("timm/vit_bas", "vit_base"),
        ("open_clip/ViT-B-33", "ViT-B-32"),
        ("vit-b-33", "open_clip/ViT-B-32"),
    ],
)
def test_wrong_name_is_answered_with_the_nearest_right_names(name, suggestion):
    with pytest.raises(patchers.ModelNameError, match=f"Did you mean .*{suggestion}"):
        patchers.load(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["someone/bert", "timm/someone/vit", "open_clip/someone/clip", "a/b/c", "no name"])
def test_name_that_cannot_be_looked_up_says_to_pass_a_directory(name):
    with pytest.raises(patchers.ModelNameError, match=r"directory|list_models"):
        patchers.load(name)


def test_library_that_is_not_installed_is_named_with_its_pip_command():
    timm_library = patchers.libraries["timm"]
    absent = patchers.Library(
        **{**vars(timm_library), "name": "imaginary", "package": "a_package_that_nobody_has"},
    )
    with pytest.raises(patchers.MissingLibraryError, match=r"pip install 'invact\[imaginary\]'"):
        absent.require()


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("bert-base-uncased", "BertForMaskedLM"),
        ("t5-small", "T5ForConditionalGeneration"),
        ("openai/whisper-tiny", "WhisperForConditionalGeneration"),
        ("timm/vit_base_patch16_224.augreg_in21k", "VisionTransformer"),
        ("open_clip/ViT-B-32", "CLIP"),
        ("open_clip/roberta-ViT-B-32", "CustomTextCLIP"),
    ],
)
def test_model_is_built_for_training_without_memory_in_the_dtype_asked_for(name, class_name):
    model = patchers.load(name, torch.bfloat16)
    assert type(model).__name__ == class_name
    assert model.training
    assert all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in model.parameters() if p.ndim > 1} == {torch.bfloat16}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    "name", ["timm/vit_base_patch16_224", "timm/resnet18", "open_clip/ViT-B-32", "openai/clip-vit-base-patch32"]
)
def test_model_and_inputs_take_another_image_size(name):
    model = patchers.load(name, image_size=64)
    inputs = patchers.example_inputs(model, image_size=64, device="meta")
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    assert first_tensor(output).requires_grad
    if name != "timm/resnet18":  # it takes images of any size
        assert shapes(patchers.example_inputs(model, device="meta")) == shapes(inputs)


def test_directory_with_a_transformers_configuration(tmp_path):
    transformers.BertConfig(**TEXT, architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    assert type(patchers.load(str(tmp_path))).__name__ == "BertForMaskedLM"


def test_configuration_that_names_no_architecture_gives_the_model_without_a_head(tmp_path):
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path)
    assert type(patchers.load(str(tmp_path))).__name__ == "BertModel"


def test_directory_with_a_timm_configuration(tmp_path):
    config = {"architecture": "resnet18", "num_classes": 10, "model_args": {"in_chans": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = patchers.load(str(tmp_path))
    assert model.fc.out_features == 10
    assert shapes(patchers.example_inputs(model)) == [(1, 1, 224, 224)]


def test_directory_with_an_open_clip_configuration(tmp_path):
    config = open_clip.get_model_config("ViT-B-32") | {"embed_dim": 64}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert patchers.load(str(tmp_path)).text_projection.shape == (512, 64)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_directory_without_a_usable_configuration_says_what_it_must_hold(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(patchers.ModelNameError, match=r"config\.json"):
        patchers.load(str(tmp_path))


def test_model_type_that_transformers_lacks_says_to_upgrade(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_the_future"}))
    with pytest.raises(patchers.ModelNameError, match="Upgrade transformers"):
        patchers.load(str(tmp_path))
