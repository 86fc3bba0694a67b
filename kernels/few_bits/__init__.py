"""A derivative kept in a few bits: the step function nearest to it, and on which of its steps each x lies."""
