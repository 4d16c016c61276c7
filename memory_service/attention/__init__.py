"""Attention over keys and values in RAM: exact top-k, dense, merge; which keys can belong to the top k."""
