"""Generated from protos/memory_service/v1; regenerate with `make protos`, never edit."""
