"""A small training job in several ways, step by step side by side, and which way is the one to use."""
