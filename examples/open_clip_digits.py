"""A small OpenCLIP model learns which image of a digit belongs to which name, patched.

pip install 'invact[open_clip]' scikit-learn
python examples/open_clip_digits.py
"""

import argparse

import open_clip
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import invact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 8, "patch_size": 2, "width": 64, "head_width": 16, "layers": 2},
        text_cfg={"context_length": 8, "width": 64, "heads": 4, "layers": 2},
    ).to(DEVICE)
    # OpenCLIP starts positions near zero, from which so short a training hardly learns them.
    torch.nn.init.normal_(model.visual.positional_embedding, std=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pair_up = open_clip.ClipLoss()

    train_images, train_labels, test_images, test_labels = digits()
    captions = open_clip.SimpleTokenizer(context_length=8)([f"the digit {name}" for name in NAMES]).to(DEVICE)
    print(invact.patch(model, example_inputs=(train_images[: len(NAMES)], captions)))

    model.train()
    for step in range(1, options.steps + 1):
        image_features, text_features, scale = model(one_of_each(train_images, train_labels), captions)
        loss = pair_up(image_features, text_features, scale)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        image_features, text_features, _ = model(test_images, captions)
    found = (image_features @ text_features.T).argmax(dim=1)
    print(f"{(found == test_labels).float().mean().item():.1%} of {len(test_labels)} test images find their name")


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images to train on, with three equal channels, their labels, images to test on, their labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device=DEVICE).view(-1, 1, 8, 8) / 8 - 1
    images = images.repeat(1, 3, 1, 1)
    targets = torch.tensor(labels, device=DEVICE)
    train, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    return images[train], targets[train], images[test], targets[test]


def one_of_each(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Ten random images in the order of `NAMES`: two of one name in a batch would be each other's wrong answer."""
    of_each = [images[labels == label] for label in range(len(NAMES))]
    return torch.stack([of_one[torch.randint(len(of_one), ())] for of_one in of_each])


if __name__ == "__main__":
    main()
