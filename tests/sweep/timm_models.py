"""timm: the smallest member of every family of every model file, on small images where the model takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

_SIZES = (
    "test",
    "femto",
    "atto",
    "zepto",
    "pico",
    "nano",
    "xxs",
    "xxt",
    "xs",
    "tiny",
    "mini",
    "t",
    "s",
    "small",
    "xxsmall",
)


def names() -> list[str]:
    """ "file/model" for the member of each family whose name promises the smallest model."""
    import timm

    families: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        file = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        families.setdefault((file, re.match("(test_)?[a-z]+", name)[0]), []).append(name)
    return [f"{file}/{min(members, key=_size)}" for (file, _), members in sorted(families.items())]


def _size(name: str) -> tuple:
    words = name.split("_")
    rank = min((_SIZES.index(word) for word in words if word in _SIZES), default=len(_SIZES))
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return (rank, "large" in words or "huge" in words or "giant" in words, sum(numbers), len(name), name)


def attempts(name: str) -> Iterator:
    """Builders of (model, inputs), smallest first; the next is tried where a model does not take the size."""
    import timm

    from invact import patchers

    architecture = name.partition("/")[2]
    published = timm.get_pretrained_cfg(architecture)
    fixed = published is not None and published.fixed_input_size
    side = published.input_size[-1] if published is not None else 224
    sizes = (
        [({"img_size": side // 2, "depth": 2}, None), ({"img_size": side // 2}, None)]
        if fixed
        else [({}, 64), ({}, 128)]
    )
    for arguments, image_size in [*sizes, ({}, None)]:

        def build(arguments=arguments, image_size=image_size):
            model = timm.create_model(architecture, num_classes=10, drop_path_rate=0.1, **arguments)
            return model, patchers.example_inputs(model, batch_size=2, image_size=image_size)

        def build_without_drop_path(arguments=arguments, image_size=image_size):
            model = timm.create_model(architecture, **arguments)
            return model, patchers.example_inputs(model, batch_size=2, image_size=image_size)

        yield build
        yield build_without_drop_path
