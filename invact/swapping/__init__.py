"""How a module is patched: it stays the object it is and gets a class of its own; and how that is undone."""
