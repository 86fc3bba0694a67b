"""A small vision transformer on real handwritten digits, stock and patched: the same accuracy from fewer bytes.

pip install 'invact[timm]' scikit-learn
python examples/vit_digits.py
"""

import argparse
import sys
import time

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import invact

BATCH = 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind, two or more")
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be 2 or more: with one there is no spread between seeds to compare with")

    train_images, train_labels, test_images, test_labels = digits()
    accuracies: dict[str, list[float]] = {"stock": [], "patched": []}
    kept_bytes: dict[str, int] = {}
    start = time.perf_counter()
    for seed in range(options.seeds):
        for kind in accuracies:
            model = vision_transformer(seed)
            batch = (train_images[:BATCH],)
            if kind == "patched":
                invact.patch(model, example_inputs=batch)
            kept_bytes[kind] = invact.activation_memory(model, batch).total_bytes
            train(model, train_images, train_labels, epochs=options.epochs, seed=seed)
            accuracies[kind].append(accuracy(model, test_images, test_labels))
            print(f"seed {seed}, {kind}: {accuracies[kind][-1]:.4f} after {time.perf_counter() - start:.0f} s")

    print(f"\nAccuracy on {len(test_labels)} test digits, and the activations that a step keeps for backward:")
    print(f"{'':8} {'accuracies':{7 * options.seeds}} {'mean':>7} {'spread':>7} {'kept':>9}")
    for kind, values in accuracies.items():
        each = "".join(f"{value:7.4f}" for value in values)
        mean = sum(values) / len(values)
        print(f"{kind:8} {each} {mean:7.4f} {spread(values):7.4f} {kept_bytes[kind] / 2**20:5.2f} MiB")

    pairs = zip(accuracies["stock"], accuracies["patched"], strict=True)
    largest_change = max(abs(stock - patched) for stock, patched in pairs)
    print(f"Patching moves an accuracy by at most {largest_change:.4f}, ", end="")
    print(f"another seed by up to {spread(accuracies['stock']):.4f}.")
    if largest_change > spread(accuracies["stock"]):
        sys.exit("The patched accuracies do not lie within the spread between seeds.")
    print("The patched accuracies lie within the spread between seeds.")


def spread(values: list[float]) -> float:
    return max(values) - min(values)


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """scikit-learn's 1,797 images of 8 x 8 pixels: those to train on, their labels, those to test on, their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device=DEVICE).view(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(labels, device=DEVICE)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return images[train], targets[train], images[test], targets[test]


def vision_transformer(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=2,
        num_heads=4,
        class_token=False,
        global_pool="avg",
    )
    # timm starts positions at a standard deviation of 0.02, from which so short a training hardly learns them.
    torch.nn.init.normal_(model.pos_embed, std=0.5)
    return model.to(DEVICE)


def train(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int, seed: int) -> None:
    torch.manual_seed(seed)
    batches = -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).to(DEVICE).split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()


if __name__ == "__main__":
    main()
