"""A corpus into a memory: found, encoded, stored, each document once."""
