"""What a worker's caller can do wrong beyond the memory service's own errors.

InvalidArgument (memory_service.errors)
├── UnsupportedModel   an architecture, layer or checkpoint this worker cannot give a memory
└── InputTooLong       more tokens than the positions can reach; the message says what would
"""

from __future__ import annotations

from memory_service.errors import InvalidArgument


class UnsupportedModel(InvalidArgument):
    """An architecture, a layer or a checkpoint that cannot get a memory; sending it again cannot help."""

    reason = "UNSUPPORTED_MODEL"


class InputTooLong(InvalidArgument):
    """More tokens than the position policy can reach without positions the model never saw."""

    reason = "INPUT_TOO_LONG"
