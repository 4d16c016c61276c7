"""The command `fot`: serve a memory, look after it, check it, measure it."""

from memory_service.cli.main import app, main

__all__ = ["app", "main"]
