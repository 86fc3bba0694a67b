"""A run with a callback shows a model's hooks and forward what a run without shows them: real tensors, as often."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

SEEN = []


class Strange(nn.Module):
    total = 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.steps, self.history = torch.zeros(()), []
        self.act.register_forward_hook(self.see)

    def see(self, module, args, out):
        SEEN.append(out.detach())
        self.history.append(out.detach())

    def forward(self, x, labels=None):
        Strange.total += 1
        self.steps += 1
        return {"loss": self.down(self.act(self.up(x))).square().mean()}


def what_was_seen(train):
    """By the model of one run: how often, and the types of what its hooks keep."""
    SEEN.clear()
    Strange.total = 0
    model = Strange()
    train(model)
    kinds = {type(value) for value in [*SEEN, *model.history]}
    return Strange.total, model.steps.item(), len(SEEN), len(model.history), kinds, [v.sum().item() for v in SEEN]


def data():
    values = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    return [{"x": row, "labels": torch.tensor(0)} for row in values]


def test_a_run_of_transformers_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from invact.callback import InvActCallback

    def run(callbacks):
        options = {"max_steps": 3, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, **options)
        return lambda model: Trainer(model, arguments, train_dataset=data(), callbacks=callbacks).train()

    callback = InvActCallback()
    stock, ours = what_was_seen(run([])), what_was_seen(run([callback]))
    assert len(callback.report.inverted) == 1
    assert ours[:5] == stock[:5]
    assert ours[5] == pytest.approx(stock[5], rel=1e-4, abs=1e-4)


def test_a_run_of_lightning():
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer

    from invact.lightning import InvActCallback

    class Task(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, number):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(callbacks):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options = {"accelerator": "cpu", "max_steps": 3, "enable_model_summary": False, **quiet}
        loader = DataLoader(data(), batch_size=4)
        return lambda model: Trainer(callbacks=callbacks, **options).fit(Task(model), loader)

    callback = InvActCallback()
    stock, ours = what_was_seen(run([])), what_was_seen(run([callback]))
    assert len(callback.report.inverted) == 1
    assert ours[:5] == stock[:5]
    assert ours[5] == pytest.approx(stock[5], rel=1e-4, abs=1e-4)
