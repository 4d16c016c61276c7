"""What callers may ask for, and in which portions documents are handed on."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
BATCH_DOCUMENTS = 256
BATCH_BYTES = MIB  # Of text: enough for full windows, and callers take turns.


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    new_tokens: int = 4096  # The longest answer.
    prompt_bytes: int = 64 * MIB  # Of a prompt's text, or of the whole HTTP request.
    document_bytes: int = 256 * MIB  # Of a document's text.
    waiting_bytes: int = 512 * MIB  # Of text that waits to be encoded.
    calls: int = 512  # Under way, of any kind.
    timeout_s: float = 600.0  # Of a call that brings no deadline, and the most it may bring.
    stop_texts: int = 16
    told: int = 64  # Documents, and passages of each, in an answer's sources.
