"""Texts and token ids whose answers are known: for training and for evaluation."""
