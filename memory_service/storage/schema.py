"""The catalogue's tables. `SCHEMA[n]` takes version n to n + 1 and is never edited.

SQLite keeps no checksums of what it stores, so every row is folded into one digest, kept by triggers: a flipped bit in
a row, or a row that went missing, no longer matches it at the next open.
"""

from __future__ import annotations

APPLICATION_ID = 0x666F7431  # "fot1"

# Table -> columns covered by the digest, in order; as they were in version 1.
_DIGESTED_1: dict[str, tuple[str, ...]] = {
    "memories": ("key", "tenant", "name", "spec", "created_at", "next_generation", "deleted"),
    "segments": ("pk", "memory_key", "path", "nbytes", "header_bytes", "header_crc"),
    "documents": (
        "pk",
        "memory_key",
        "id",
        "generation",
        "tokens",
        "metadata",
        "committed_at",
        "request_id",
        "deleted",
    ),
    "parts": ("segment_pk", "number", "document_pk", "offset", "part", "parts", "first_token", "tokens", "crcs"),
    "requests": ("tenant", "request_id", "kind", "memory_key", "fingerprint", "answer", "created_at"),
    "operations": (
        "id",
        "tenant",
        "memory",
        "kind",
        "state",
        "done",
        "total",
        "message",
        "created_at",
        "updated_at",
    ),
}

# As they are now.
DIGESTED = _DIGESTED_1 | {"operations": (*_DIGESTED_1["operations"], "snapshot")}

_TABLES_1 = """
CREATE TABLE state (digest INTEGER NOT NULL);
INSERT INTO state VALUES (0);

CREATE TABLE memories (
    key TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    spec TEXT NOT NULL,
    created_at REAL NOT NULL,
    next_generation INTEGER NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX memories_by_name ON memories (tenant, name) WHERE NOT deleted;

CREATE TABLE segments (
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    memory_key TEXT NOT NULL REFERENCES memories (key) ON DELETE CASCADE,
    path TEXT NOT NULL,
    nbytes INTEGER NOT NULL,
    header_bytes INTEGER NOT NULL,
    header_crc INTEGER NOT NULL,
    UNIQUE (memory_key, path)
);

CREATE TABLE documents (
    pk INTEGER PRIMARY KEY AUTOINCREMENT,
    memory_key TEXT NOT NULL REFERENCES memories (key) ON DELETE CASCADE,
    id TEXT NOT NULL,
    generation INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    committed_at REAL NOT NULL,
    request_id TEXT NOT NULL,
    deleted INTEGER NOT NULL DEFAULT 0,
    UNIQUE (memory_key, id, generation)
);
CREATE UNIQUE INDEX documents_alive ON documents (memory_key, id) WHERE NOT deleted;

CREATE TABLE parts (
    segment_pk INTEGER NOT NULL REFERENCES segments (pk) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    document_pk INTEGER REFERENCES documents (pk) ON DELETE SET NULL,
    offset INTEGER NOT NULL,
    part INTEGER NOT NULL,
    parts INTEGER NOT NULL,
    first_token INTEGER NOT NULL,
    tokens INTEGER NOT NULL,
    crcs BLOB NOT NULL,
    PRIMARY KEY (segment_pk, number)
);
CREATE INDEX parts_by_document ON parts (document_pk, part);

CREATE TABLE requests (
    tenant TEXT NOT NULL,
    request_id TEXT NOT NULL,
    kind TEXT NOT NULL,
    memory_key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    answer TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (tenant, request_id)
);
CREATE INDEX requests_by_time ON requests (created_at);

CREATE TABLE operations (
    id TEXT PRIMARY KEY NOT NULL,
    tenant TEXT NOT NULL,
    memory TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    done INTEGER NOT NULL,
    total INTEGER NOT NULL,
    message TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL
);
"""


def _digest_triggers(table: str, columns: tuple[str, ...]) -> str:
    old, new = (", ".join(f"{row}.{column}" for column in columns) for row in ("OLD", "NEW"))
    folded = {
        "INSERT": f"fold(digest, '{table}', {new})",
        "DELETE": f"fold(digest, '{table}', {old})",
        "UPDATE": f"fold(fold(digest, '{table}', {old}), '{table}', {new})",
    }
    return "".join(
        f"CREATE TRIGGER {table}_{event.lower()} AFTER {event} ON {table} "
        f"BEGIN UPDATE state SET digest = {value}; END;\n"
        for event, value in folded.items()
    )


# The rows leave the digest as they were, and enter it as they are.
_OPERATIONS_2 = f"""
CREATE TEMP TABLE moved AS SELECT * FROM operations;
DELETE FROM operations;
DROP TRIGGER operations_insert;
DROP TRIGGER operations_delete;
DROP TRIGGER operations_update;
ALTER TABLE operations ADD COLUMN snapshot TEXT NOT NULL DEFAULT '';
{_digest_triggers("operations", DIGESTED["operations"])}
INSERT INTO operations SELECT *, '' FROM moved;
DROP TABLE moved;
"""

SCHEMA = (
    _TABLES_1
    + "".join(_digest_triggers(table, columns) for table, columns in _DIGESTED_1.items())
    + f"PRAGMA application_id = {APPLICATION_ID};",
    _OPERATIONS_2,
)
