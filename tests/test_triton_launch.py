"""What Triton has built is found again for the same constants, dtypes and kind of length, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


class Kernel:
    """Stands for one of Triton's: notes what it was built for, and with what each of the built was run."""

    def __init__(self) -> None:
        self.built: list[tuple[Any, ...]] = []
        self.run_again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def build(*arguments: Any) -> Any:
            self.built.append((grid, *arguments))
            return {grid: lambda *again: self.run_again.append(again)}

        return build


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    from invact.kernels.triton import launch as triton_launch

    monkeypatch.setattr(triton_launch, "REUSED", True)
    monkeypatch.setattr(triton_launch, "built", {})
    return triton_launch.launch


def test_what_is_built_is_built_once_for_each_kind_of_call(launch: Callable[..., None]) -> None:
    kernel, constants, x = Kernel(), {"CURVE": "gelu"}, torch.zeros(64)
    for number in (0.5, 0.25):
        launch(kernel, constants, (x,), 64, numbers=(number,))
    assert len(kernel.built) == 1
    assert [call[1:3] for call in kernel.run_again] == [(64, 0.25)]  # the tensors, n, and the numbers
    launch(kernel, constants, (x.half(),), 64, numbers=(0.5,))
    launch(kernel, constants, (x,), 63, numbers=(0.5,))
    launch(kernel, dict(constants), (x,), 64, numbers=(0.5,))
    launch(kernel, constants, (x,), 64, numbers=(0.5,), rows_a_thread=2)
    assert len(kernel.built) == 5


def test_what_lies_at_no_multiple_of_16_bytes_is_not_found_again(launch: Callable[..., None]) -> None:
    kernel, x = Kernel(), torch.zeros(65)
    for _ in range(2):
        launch(kernel, {}, (x[1:],), 64)
    assert len(kernel.built) == 2
    assert not kernel.run_again


def test_a_program_has_as_many_rows_as_it_is_told(launch: Callable[..., None]) -> None:
    from invact.kernels.triton.launch import ROWS

    kernel, x = Kernel(), torch.zeros(1)
    for rows_a_thread in (1, 2):
        launch(kernel, {}, (x,), 8 * ROWS * 2 + 1, rows_a_thread=rows_a_thread)
    assert [call[0] for call in kernel.built] == [(3, 1, 1), (2, 1, 1)]
    assert [call[3] for call in kernel.built] == [ROWS, 2 * ROWS]
