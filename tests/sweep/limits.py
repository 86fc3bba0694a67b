"""How large a model the sweep takes."""

from torch import nn

LARGEST = 300_000_000  # parameters


class TooLargeError(Exception):
    """Even the smallest configuration takes too much."""


def check_size(model: nn.Module) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > LARGEST:
        raise TooLargeError(f"{parameters / 1e6:.0f}M parameters, and the sweep stops at {LARGEST / 1e6:.0f}M")
