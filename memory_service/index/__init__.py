"""Approximate candidates: Faiss indexes over keys, derived and rebuilt at any time."""
