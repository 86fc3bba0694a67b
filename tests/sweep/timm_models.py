"""timm: the smallest member of every family of every model file, on small images where the model takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

_SMALL = ["test", "femto", "atto", "zepto", "pico", "nano", "xxs", "xxt", "xs", "tiny", "mini", "t", "s", "small"]


def names() -> list[str]:
    """The member of each family whose name promises the smallest model, as file/model."""
    import timm

    families: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        families.setdefault((file, re.match("(test_)?[a-z]+", name)[0]), []).append(name)
    return [f"{file}/{min(members, key=_size)}" for (file, _), members in sorted(families.items())]


def _size(name: str) -> tuple:
    words = name.split("_")
    rank = min((_SMALL.index(word) for word in words if word in _SMALL), default=len(_SMALL))
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return (rank, "large" in words or "huge" in words or "giant" in words, sum(numbers), len(name), name)


def attempts(name: str) -> Iterator:
    """(what builds the model, what makes its inputs), smallest first; not every model takes every size."""
    import timm

    architecture = name.partition("/")[2]
    published = timm.get_pretrained_cfg(architecture)
    side = published.input_size[-1] if published is not None else 224
    small = {"num_classes": 10, "drop_path_rate": 0.1}
    if published is not None and published.fixed_input_size:
        half = side // 2
        sizes = [({**small, "img_size": half, "depth": 2}, half), ({**small, "img_size": half}, half)]
    else:
        sizes = [(small, 64), ({}, 64), (small, 128)]
    for arguments, image_size in [*sizes, (small, None), ({}, None)]:
        yield partial(timm.create_model, architecture, **arguments), [partial(_images, image_size=image_size)]


def _images(model, image_size: int | None):
    from invact import patchers

    return patchers.example_inputs(model, batch_size=2, image_size=image_size)
