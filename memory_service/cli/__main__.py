"""`python -m memory_service.cli` is `fot`."""

from memory_service.cli.main import main

main()
