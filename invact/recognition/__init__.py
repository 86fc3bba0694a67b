"""What a model computes, told by running it and never from a name: curves, expressions in methods, norms."""
