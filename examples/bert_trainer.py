"""BERT on the text of the Python manual with transformers.Trainer; `invact.InvActCallback` is all that invact adds.

pip install 'invact[transformers]' accelerate
python examples/bert_trainer.py
"""

import argparse
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

import invact

MASK = 256  # the bytes come first
IGNORED = -100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="bytes of text in one example")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=MASK + 1,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=options.length,
        )
    )
    callback = invact.InvActCallback()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=1e-3,
                logging_steps=max(1, options.steps // 6),
                save_strategy="no",
                report_to="none",
                bf16=torch.cuda.is_available(),
            ),
            train_dataset=pieces_of_the_manual(options.length),
            data_collator=masked,
            callbacks=[callback],
        )
        trainer.train()
    print(callback.report)


def pieces_of_the_manual(length: int) -> list[torch.Tensor]:
    """The texts behind Python's help(), some 700 KB, as bytes cut into pieces."""
    text = torch.tensor(list("\n".join(topics.values()).encode()))
    return list(text[: len(text) // length * length].view(-1, length))


def masked(pieces: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch in which 15% of the bytes are masked, and are what is to be found."""
    tokens = torch.stack(pieces)
    hidden = torch.rand(tokens.shape) < 0.15
    return {"input_ids": tokens.masked_fill(hidden, MASK), "labels": tokens.masked_fill(~hidden, IGNORED)}


if __name__ == "__main__":
    main()
