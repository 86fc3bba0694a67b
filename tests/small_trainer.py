"""A small BERT that a `Trainer` trains to classify, its losses, and what is inverted meanwhile."""

import pytest
import torch

from invact.swapping.inversion import Inverted

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

LAYERS = 2


def classifier():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2)
    )


def sentences(count=32):
    """Label 1 where token 7 occurs first."""
    tokens = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row[0] > 25)} for row in tokens]


def trainer(folder, callbacks=(), model=None, kind=Trainer, dataset=None, **arguments):
    arguments = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "report_to": "none", **arguments}
    return kind(
        model or classifier(),
        TrainingArguments(
            str(folder), per_device_train_batch_size=4, disable_tqdm=True, use_cpu=True, seed=3, **arguments
        ),
        train_dataset=dataset or sentences(),
        eval_dataset=sentences(8),
        callbacks=list(callbacks),
    )


def trained(*args, **options):
    """A Trainer seeds when it is made, so it is trained before the next is made."""
    run = trainer(*args, **options)
    run.train()
    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def inverted(model):
    return [module for module in model.modules() if isinstance(module, Inverted)]


class Watch(TrainerCallback):
    """Counts the inverted modules at the events of a run."""

    def __init__(self):
        self.at_first_step = None
        self.while_training = 0

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.at_first_step is None:
            self.at_first_step = len(inverted(model))

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.while_training = len(inverted(model))
