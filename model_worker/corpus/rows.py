"""Rows of JSONL, Parquet and datasets: which fields are text, token ids, id and metadata."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memory_service.errors import InvalidArgument
from model_worker.corpus.files import Found
from model_worker.corpus.source import Note, NoteTaker, Source, fitting

MASK = "attention_mask"


@dataclass(frozen=True, slots=True)
class Columns:
    """What the fields of a row mean."""

    text: str = "text"
    tokens: str = "input_ids"  # Token ids win over text; those that an attention_mask hides are padding.
    id: str | None = None  # None: the file's name and the row's number.
    metadata: tuple[str, ...] | None = None  # None: every other field that holds one value.

    def wanted(self, fields: Iterable[str], single: Iterable[str]) -> list[str]:
        """Of a table's `fields`, of which `single` hold one value, those worth reading.

        Raises InvalidArgument if none of them is text or token ids, or if the field of ids or metadata is not there.
        """
        fields = list(fields)
        if self.text not in fields and self.tokens not in fields:
            raise InvalidArgument(self._missing(fields))
        for name in (*filter(None, [self.id]), *(self.metadata or ())):
            if name not in fields:
                raise InvalidArgument(f"no field {name!r}; there are {', '.join(fields)}")
        content = {self.text, self.tokens} & set(fields)
        if self.tokens in fields and MASK in fields:
            content.add(MASK)
        told = set(single) if self.metadata is None else set(self.metadata)
        return [name for name in fields if name in content | told or name == self.id]

    def source(
        self, row: Mapping[str, object], number: int, found: Found, name: str, size: int, note: NoteTaker
    ) -> Source | None:
        """The document of row `number`, counted from 0, of the table `name`; None, with a note, if it has no content.

        Raises InvalidArgument, naming the row, for a row without the text's field or with something else in it.
        """
        where = f"{name}#{number}"
        text, tokens = row.get(self.text), row.get(self.tokens)
        if self.text not in row and self.tokens not in row:
            raise InvalidArgument(f"{where} has {self._missing(row)}")
        if tokens is None and not isinstance(text, str | None):
            raise InvalidArgument(f"field {self.text!r} of {where} holds a {type(text).__name__}, not text")
        if tokens == [] or (tokens is None and not (text and str(text).strip())):
            note(Note(where, "has no text", size=size))
            return None
        told = {key: one for key, one in row.items() if key not in (self.text, self.tokens, MASK, self.id)}
        if self.metadata is not None:
            told = {key: row.get(key) for key in self.metadata}
        kept, out = fitting({"path": found.name, "root": found.root, "format": str(found.format), "row": number} | told)
        for key, why in out.items():
            if self.metadata is None and why.startswith("is a "):
                continue  # A list or an object is not taken for metadata in the first place.
            note(Note(name, f"field {key!r} is no metadata: in some rows it {why}"))
        return Source(
            id=self._id(row, where),
            text=text if tokens is None else None,  # type: ignore[arg-type]  # checked above
            token_ids=None if tokens is None else _token_ids(tokens, row.get(MASK), self.tokens, where),
            metadata=kept,
            size=size,
        )

    def _id(self, row: Mapping[str, object], where: str) -> str:
        if self.id is None:
            return where
        value = row.get(self.id)
        if value is None or isinstance(value, bool | float) or not isinstance(value, str | int):
            raise InvalidArgument(f"field {self.id!r} of {where} should be the document's id, but it holds {value!r}")
        return str(value)

    def _missing(self, fields: Iterable[str]) -> str:
        return (
            f"neither {self.text!r} nor {self.tokens!r}; name the field of the text, of {', '.join(fields) or 'none'}"
        )


def _token_ids(tokens: object, mask: object, field: str, where: str) -> tuple[int, ...]:
    if not isinstance(tokens, Sequence) or not all(type(one) is int and 0 <= one < 1 << 31 for one in tokens):
        raise InvalidArgument(f"field {field!r} of {where} should hold token ids, whole numbers from 0")
    if isinstance(mask, Sequence) and len(mask) == len(tokens):
        return tuple(token for token, seen in zip(tokens, mask, strict=True) if seen)
    return tuple(tokens)
