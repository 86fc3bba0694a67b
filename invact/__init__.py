"""invact: neural networks that train in less memory, by inverting their pointwise activations."""

__version__ = "0.1.0"
