"""A limit on how long a forward pass may take, kept without signals or threads."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from invact.errors.own_errors import users_call
from invact.pytorch.modes import TorchDispatchMode


class TookTooLongError(TimeoutError):
    """A forward pass was stopped at its time limit."""


class Deadline:
    """The end of a block's time, which whoever runs its tensor operations asks for after each of them.

    Raises:
        TookTooLongError: from the first operation that ends later than `seconds` after the block was entered, and at
            the end of the block where the model caught that.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = float("inf")
        self._error: TookTooLongError | None = None

    def __enter__(self) -> Deadline:
        self._at = time.monotonic() + self._seconds
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is None and self._error is not None:
            raise self._error

    def check(self, out: Any) -> None:
        """Told what an operation gave: C++ asks for a fake tensor's device from where an error would end the process.

        Of an operation that gave no tensor nothing is raised.
        """
        if time.monotonic() > self._at and isinstance(out, Tensor):
            self._error = TookTooLongError(
                f"The model's forward had not ended after {self._seconds:g} s. invact runs it to see what it keeps for "
                "backward, which takes seconds for most models; what it had changed was put back. Pass smaller "
                "example_inputs, or raise invact.probing.TIME_LIMIT (in seconds) if the model only needs longer."
            )
            raise self._error


class TimeLimit(TorchDispatchMode):
    """Stops this thread at the first tensor operation that ends later than `seconds` after the block was entered.

    Code that calls no tensor operation, such as one that waits for a network, is not stopped. Simulated operations
    are asked after by who simulates them; see `invact.simulation.simulated_tensors.Simulation`.

    Raises:
        TookTooLongError: as `Deadline` does.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._deadline = Deadline(seconds)

    def __enter__(self) -> TimeLimit:
        self._deadline.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)
        self._deadline.__exit__(kind, error, traceback)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = users_call(func, *args, **(kwargs or {}))
        self._deadline.check(out)
        return out
