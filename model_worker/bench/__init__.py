"""Benchmarks: `fot bench prefill|decode`. Each module has `run(...) -> Result` and `render(result)`."""
