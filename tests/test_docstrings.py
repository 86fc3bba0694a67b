"""The examples in the docstrings of every module run and give what they show."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import invact.kernels
import invact.patchers


def modules() -> Iterator[str]:
    """Of all three packages, which stand in folders of their own in a checkout."""
    for package in (invact, invact.kernels, invact.patchers):
        yield package.__name__
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield module.name


def shows_examples(name: str) -> bool:
    """Known from its source, since to import it may need what is not installed."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None and ">>> " in Path(spec.origin).read_text()


WITH_EXAMPLES = sorted({name for name in modules() if shows_examples(name)})


def test_examples_were_found_in_all_three_packages() -> None:
    for package in (invact, invact.kernels, invact.patchers):
        assert any(name.startswith(f"{package.__name__}.") for name in WITH_EXAMPLES)
    assert len(WITH_EXAMPLES) >= 30


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} can not be imported here: {error}")
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
