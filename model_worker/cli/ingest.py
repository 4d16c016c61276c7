def ingest() -> None:
    """Encode documents and store them in a memory."""
