"""What is installed: every folder of the package, so that a wheel has all that a checkout has."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_every_folder_with_code_is_a_package_that_is_installed():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    roots = {"invact": "invact", "kernels": "invact.kernels", "patchers": "invact.patchers"}
    folders = {path.parent.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("*.py")}
    assert {".".join([roots[folder.parts[0]], *folder.parts[1:]]) for folder in folders} == listed
