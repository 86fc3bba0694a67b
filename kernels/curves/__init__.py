"""The activations: what each computes, and how its derivative is told from its output."""
