"""`python -m invact` is `invact`."""

from invact.cli import main

main()
