"""One file per command, and what they share. None imports torch before it runs."""
