"""GPT-2 sharded by FSDP2 over several processes: patch first, shard then.

pip install 'invact[transformers]'
torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import os
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

import invact

USES_GPU = torch.cuda.is_available()
DEVICE = f"cuda:{os.environ['LOCAL_RANK']}" if USES_GPU else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8, help="in each process")
    parser.add_argument("--length", type=int, default=128, help="bytes of text in one example")
    options = parser.parse_args()

    if USES_GPU:
        torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl" if USES_GPU else "gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same weights everywhere
    config = GPT2Config(
        vocab_size=256,
        n_positions=options.length,
        n_embd=128,
        n_layer=4,
        n_head=4,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).to(DEVICE)
    torch.manual_seed(rank)  # other text everywhere
    tokens = some_of_the_manual(options.batch_size, options.length)

    report = invact.patch(model, example_inputs={"input_ids": tokens, "labels": tokens})
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    if rank == 0:
        print(report)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, options.steps + 1):
        tokens = some_of_the_manual(options.batch_size, options.length)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == options.steps):
            print(f"step {step}: loss {loss.item():.3f}")
    dist.destroy_process_group()


TEXT = torch.tensor(list("\n".join(topics.values()).encode()))


def some_of_the_manual(count: int, length: int) -> torch.Tensor:
    """Random pieces of the texts behind Python's help(), as bytes, shape (count, length)."""
    starts = torch.randint(len(TEXT) - length, (count, 1))
    return TEXT[starts + torch.arange(length)].to(DEVICE)


if __name__ == "__main__":
    main()
