"""What a trial trains on: text as characters, or labelled images; from a file, a folder, or what comes with Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DIGITS = "digits"
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class DataError(ValueError):
    """Data that are missing, empty, too few, or of the wrong kind."""


@dataclass(frozen=True)
class Text:
    """A text as ranks of its characters, the most frequent character first."""

    name: str
    ranks: Tensor
    alphabet: int  # how many different characters there are


@dataclass(frozen=True)
class Images:
    """Images as floats from -1 to 1 of shape (n, 3, height, width), and the class of each."""

    name: str
    pixels: Tensor
    labels: Tensor
    classes: list[str]


def load_text(source: str | None) -> Text:
    """The text in a file; of Python's language reference, if none is given.

    Raises:
        DataError: there is no such file, or it holds no text.
    """
    if source is None:
        return _as_ranks("Python's language reference", _language_reference())
    path = _existing(source)
    if source == DIGITS or path.is_dir():
        what = "images" if source == DIGITS else "a folder"
        raise DataError(f"This model reads text, and {source} is {what}. Pass a text file as --data, or leave it out.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{source} is not a text file in UTF-8, which this model reads.") from None
    if not text.strip():
        raise DataError(f"{source} is empty, so there is nothing to train on.")
    return _as_ranks(path.name, text)


def load_images(source: str | None, size: tuple[int, int, int]) -> Images:
    """scikit-learn's digits, or the images below a folder, as (channels, height, width).

    Images are classed by the folder that they are in; in one folder alone every image is a class of its own.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if source in (None, DIGITS):
        return _digits(size)
    folder = _existing(str(source))
    if folder.is_file():
        raise DataError(f"This model reads images, and {source} is a file. Pass a folder of images or `{DIGITS}`.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"No image was found in the folder {source}. Put images into it, or pass --data {DIGITS}.")
    pixels = torch.stack([_pixels(file, size) for file in files])
    folders = [file.parent.name for file in files]
    names = folders if len(set(folders)) > 1 else [file.stem for file in files]
    classes = sorted(set(names))
    return Images(folder.name, pixels, torch.tensor([classes.index(name) for name in names]), classes)


def _existing(source: str) -> Path:
    path = Path(source)
    if not source or not (path.exists() or source == DIGITS):
        source = source or "file without a name"
        raise DataError(f"There is no {source}. Pass as --data a text file, a folder of images, or `{DIGITS}`.")
    return path


def _language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _as_ranks(name: str, text: str) -> Text:
    by_frequency = {character: rank for rank, (character, _) in enumerate(Counter(text).most_common())}
    return Text(name, torch.tensor([by_frequency[character] for character in text]), len(by_frequency))


def _digits(size: tuple[int, int, int]) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "The digits come with scikit-learn, which is not installed. Install it with: pip install 'invact[trial]'"
        ) from None
    pixels, labels = load_digits(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return Images(DIGITS, small.expand(-1, size[0], -1, -1), torch.tensor(labels), classes)


def _pixels(file: Path, size: tuple[int, int, int]) -> Tensor:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    channels, height, width = size
    try:
        with Image.open(file) as image:
            array = np.array(image.convert("RGB").resize((width, height)))
    except (UnidentifiedImageError, OSError):
        raise DataError(f"{file} can not be read as an image. Take it out of the folder.") from None
    pixels = torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
    return pixels if channels == 3 else pixels.mean(dim=0, keepdim=True).expand(channels, -1, -1)


def resized(pixels: Tensor, size: tuple[int, int, int]) -> Tensor:
    """A batch at the size that the model reads."""
    height, width = size[1:]
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bilinear")
