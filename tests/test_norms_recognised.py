"""RMS norms in steps are recognised by what they compute, and lookalikes are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import invact
from invact.recognition.fused_rms_norm import RmsNorm
from invact.recognition.norms_in_steps import recognise_norm


@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (LlamaRMSNorm(48, eps=1e-5), RmsNorm("weight", 1e-5)),
        (T5LayerNorm(48, eps=1e-6), RmsNorm("weight", 1e-6)),
        (Olmo2RMSNorm(48, eps=1e-5), RmsNorm("weight", 1e-5)),
        (GemmaRMSNorm(48, eps=1e-6), RmsNorm("weight", 1e-6, offset=1)),
        (Gemma3RMSNorm(48, eps=1e-6), RmsNorm("weight", 1e-6, offset=1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_in_steps_is_recognised_with_its_eps_and_how_it_uses_its_weight(module, norm):
    nn.init.normal_(module.weight)
    before = module.weight.clone()
    assert recognise_norm(module) == norm
    assert torch.equal(module.weight, before)


class InSteps(nn.Module):
    """A norm as people write it, with what each of the lookalikes does otherwise."""

    def __init__(self, width=48):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def mean_square(self, x):
        return x.square().mean(-1, keepdim=True)

    def forward(self, x):
        return x * torch.rsqrt(self.mean_square(x) + 1e-6) * self.scale


class OfTheFirstHalf(InSteps):
    def mean_square(self, x):
        return x[..., : x.shape[-1] // 2].square().mean(-1, keepdim=True)


class Centred(InSteps):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OverTheBatch(InSteps):
    def mean_square(self, x):
        return x.square().mean()


class WithoutGradientOfItsMean(InSteps):
    def mean_square(self, x):
        return super().mean_square(x).detach()


class Counting(InSteps):
    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class OnlyInTraining(InSteps):
    def forward(self, x):
        return super().forward(x) if self.training else x


class OfTwoVectors(InSteps):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(48))


class Clipped(InSteps):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class ClippedFarOut(InSteps):
    def forward(self, x):
        return super().forward(x.clamp(-65504, 65504))


class WithoutNan(InSteps):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))


class EpsOutsideOfTheRoot(InSteps):
    def forward(self, x):
        return x / (self.mean_square(x).sqrt() + 1e-8) * self.scale


class EpsAsTheLeast(InSteps):
    def forward(self, x):
        return x * torch.rsqrt(self.mean_square(x).clamp(min=1e-6)) * self.scale


class OfTheSizeOfItsWeight(InSteps):
    def forward(self, x):
        return x * torch.rsqrt(self.mean_square(x) + 1e-6) * self.scale.abs()


class OfImagesOverTheirChannels(InSteps):
    def mean_square(self, x):
        return x.square().mean(1 if x.dim() == 4 else -1, keepdim=True)


class OtherwiseIn16Bits(InSteps):
    def forward(self, x):
        return super().forward(x) if x.dtype is torch.float32 else x * self.scale


class WidensIts16Bits(InSteps):
    def forward(self, x):
        return super().forward(x.float())


class WithoutGradientInEvaluation(InSteps):
    def forward(self, x):
        return super().forward(x) if self.training else super().forward(x).detach()


def test_a_norm_written_by_the_user_is_recognised_by_any_name_of_its_weight():
    assert recognise_norm(InSteps()) == RmsNorm("scale", pytest.approx(1e-6, rel=1e-3))


@pytest.mark.parametrize(
    "kind",
    [
        OfTheFirstHalf,
        Centred,
        OverTheBatch,
        WithoutGradientOfItsMean,
        Counting,
        OnlyInTraining,
        OfTwoVectors,
        Clipped,
        ClippedFarOut,
        WithoutNan,
        EpsOutsideOfTheRoot,
        EpsAsTheLeast,
        OfTheSizeOfItsWeight,
        OfImagesOverTheirChannels,
        OtherwiseIn16Bits,
        WidensIts16Bits,
        WithoutGradientInEvaluation,
        lambda: nn.LayerNorm(48, bias=False),
        lambda: nn.PReLU(48),
    ],
)
def test_a_lookalike_is_not(kind):
    assert recognise_norm(kind()) is None


def test_a_norm_that_is_the_fused_operator_already_is_left_alone():
    assert recognise_norm(nn.RMSNorm(48)) is None


def test_a_tensor_of_more_dimensions_than_it_was_tried_with_takes_its_steps(fused_here, monkeypatch):
    model = nn.Sequential(nn.Linear(48, 48), LlamaRMSNorm(48))
    invact.patch(model, (torch.randn(8, 48),))
    monkeypatch.setattr(F, "rms_norm", None)  # whoever calls it fails
    with pytest.raises(TypeError):
        model(torch.randn(2, 2, 2, 48))
    model(torch.randn(2, 2, 2, 2, 48))
