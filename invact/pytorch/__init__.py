"""What is leaned on inside PyTorch: each private name, what for, and what breaks without."""
