"""Benchmarks: `fot bench attend|ingest|wire`. Each module has `run(...) -> Result` and `render(result)`."""
