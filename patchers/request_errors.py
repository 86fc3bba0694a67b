"""What was asked for can not be had: the errors that a command line shows as one sentence."""

from __future__ import annotations


class RequestError(Exception):
    """What was asked for can not be had; the message says why, and what to do."""


class ModelNameError(RequestError, ValueError):
    """No model goes by the given name."""


class InputSizeError(RequestError, ValueError):
    """A batch, sequence or image size that the model cannot take, or inputs that cannot be made up."""


class AdapterError(RequestError, ValueError):
    """Adapters or a quantisation that the model cannot have."""


class MissingLibraryError(RequestError, ImportError):
    """The library that a model comes from is not installed."""
