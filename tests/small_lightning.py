"""A small classifier that Lightning trains, its losses, and what is inverted meanwhile."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from invact.swapping.inversion import Inverted

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Linear(16, 64), torch.nn.GELU())
        self.second = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))
        self.losses = []
        self.inverted_in_step = []
        self.inverted_in_validation = []

    def forward(self, x):
        return self.second(self.first(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        self.inverted_in_step.append(len(inverted(self)))
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.automatic_optimization:
            self.losses.append(outputs["loss"].item())

    def validation_step(self, batch, batch_idx):
        self.inverted_in_validation.append(len(inverted(self)))
        self.log("validation_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def inverted(module):
    return [child for child in module.modules() if isinstance(child, Inverted)]


def data(count=24):
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    pairs = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    return torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)


def trained(folder, callbacks=(), module=None, checkpoint=None, **options):
    module = module or Classifier()
    options = {"max_steps": 6, "logger": False, "enable_checkpointing": False, **options}
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data(), data(8) if options.get("limit_val_batches") else None, ckpt_path=checkpoint)
    return module, trainer
