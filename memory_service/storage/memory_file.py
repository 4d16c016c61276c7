"""A memory's description beside its segments, so that a rebuilt catalogue knows its tenant and name. No I/O here."""

from __future__ import annotations

import json
from dataclasses import dataclass

from memory_service.checksums import crc32
from memory_service.errors import DataLoss
from memory_service.storage.parts import spec_from_json, spec_to_json
from memory_service.types.specs import MemorySpec

FORMAT = "fot.memory.v1"


@dataclass(frozen=True, slots=True)
class MemoryFile:
    """What a memory is."""

    tenant: str
    name: str
    spec: MemorySpec
    created_at: float  # Seconds since the epoch.


def memory_to_json(memory: MemoryFile) -> bytes:
    """The file's bytes, with their own checksum."""
    data: dict[str, object] = {
        "format": FORMAT,
        "tenant": memory.tenant,
        "name": memory.name,
        "spec": spec_to_json(memory.spec),
        "created_at": memory.created_at,
    }
    return json.dumps(data | {"crc32": crc32(json.dumps(data).encode())}, indent=1).encode()


def memory_from_json(block: bytes) -> MemoryFile:
    """Read the file back; DataLoss unless it is exactly what `memory_to_json` wrote."""
    try:
        data = json.loads(block)
        memory = MemoryFile(data["tenant"], data["name"], spec_from_json(data["spec"]), data["created_at"])
        if memory_to_json(memory) == block:
            return memory
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataLoss("memory.json is damaged") from error
    raise DataLoss("memory.json does not match its checksum")
