"""A training loop in plain PyTorch under torch.autocast: one line before it, nothing changed in it.

pip install invact
python examples/plain_loop_autocast.py
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import invact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 2)
    ).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    points, _ = two_spirals(options.batch_size)
    print(invact.patch(model, example_inputs=(points,), autocast=torch.bfloat16))

    for step in range(1, options.steps + 1):
        points, spiral = two_spirals(options.batch_size)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = F.cross_entropy(model(points), spiral)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}")


def two_spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane, shape (count, 2), and on which of two interleaved spirals each lies."""
    spiral = torch.randint(0, 2, (count,))
    turn = torch.rand(count).sqrt()
    angle = 2 * torch.pi * (turn + spiral / 2)
    points = turn[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return points.to(DEVICE), spiral.to(DEVICE)


if __name__ == "__main__":
    main()
