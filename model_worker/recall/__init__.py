"""Reading and writing the memory of a batch: rows of sessions, calls in order, and the tally of what was read."""
