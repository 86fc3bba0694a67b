"""What runs in an activation's place: its output is kept for backward, or a few bits, instead of its input."""
