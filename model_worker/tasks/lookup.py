"""Key-value look-up with random UUIDs: one JSON object, one question, in the form of ∞-Bench's Retrieve.KV."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple
from uuid import UUID

from model_worker.tasks.parts import Part, Role

TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
OPENING = "JSON data:\n{"
FIRST_GROUP = 8  # Hex digits before a UUID's first dash.


class Record(NamedTuple):
    """A key and its value, both UUIDs."""

    key: str
    value: str


def record(rng: Random) -> Record:
    """Two random UUIDs of version 4."""
    key, value = (str(UUID(int=rng.getrandbits(128), version=4)) for _ in range(2))
    return Record(key, value)


PARTS = 4  # Of a listed record.


def listed(records: Sequence[Record]) -> list[Part]:
    """The records as they stand inside the object's braces, four parts each: before the key, key, `": "`, value.

    The last value is not closed: a quote and a brace, or a quote and a comma, are one token in some vocabularies.
    """
    parts: list[Part] = []
    for place, one in enumerate(records):
        parts += [
            Part('"' if place == 0 else '", "', Role.PLAIN),
            Part(one.key, Role.NEW),
            Part('": "', Role.PLAIN),
            Part(one.value, Role.NEW),
        ]
    return parts


def asked(one: Record) -> list[Part]:
    """The benchmark's question, and the answer."""
    return [
        Part('\n\nKey: "', Role.QUESTION),
        Part(one.key, Role.NEW),
        Part('"\nThe value associated with the specified key is: ', Role.QUESTION),
        *answered(one),
        Part("\n", Role.STOP),
    ]


def continued(one: Record) -> list[Part]:
    """The record begun once more, as an object would list it: an easier question, for training."""
    return [
        Part('\n{"', Role.QUESTION),
        Part(one.key, Role.NEW),
        Part('": "', Role.QUESTION),
        *answered(one),
        Part('"}', Role.STOP),
    ]


def answered(one: Record) -> list[Part]:
    """The value in two parts: what has to be found, and what follows it once it is found."""
    return [Part(one.value[:FIRST_GROUP], Role.ANSWER), Part(one.value[FIRST_GROUP:], Role.COPIED)]
