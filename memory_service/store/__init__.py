"""Runs every verb over all memories of one directory, or of RAM. Knows nothing of gRPC."""
