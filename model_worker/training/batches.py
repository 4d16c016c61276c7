"""Batches by the name of their source."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from memory_service.errors import InvalidArgument
from model_worker.tasks.tokens import Tokenizer
from model_worker.training.definitions import DefinitionSource
from model_worker.training.documents import DocumentSource
from model_worker.training.retrieval import RetrievalSource
from model_worker.training.shapes import Batch, Shape, Source

__all__ = ["Batch", "Shape", "Source", "source_of"]

TEXTS: Mapping[str, type[Source]] = {"retrieval": RetrievalSource, "documents": DocumentSource}
NAMES = (*TEXTS, "dictionary")


def source_of(name: str, tokenizer: Tokenizer | None, seed: int, **options: object) -> Source:
    """The source of that name: retrieval, dictionary or documents.

    Raises InvalidArgument for another name, for options the source does not have, and for a tokenizer it cannot use.
    """
    if name == "dictionary":
        return _made(DefinitionSource, name, {"seed": seed}, options)
    if name not in TEXTS:
        raise InvalidArgument(f"there is no source {name!r}; there are {', '.join(NAMES)}")
    if tokenizer is None:
        raise InvalidArgument(f"the source {name} is made of text: give the configuration a tokenizer")
    given: dict[str, object] = {"tokenizer": tokenizer, "seed": seed}
    if name == "retrieval":
        given["texts"] = None
    return _made(TEXTS[name], name, given, options)


def _made(kind: type[Source], name: str, given: dict[str, object], options: dict[str, object]) -> Source:
    known = {key: told for key, told in inspect.signature(kind).parameters.items() if key not in given}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidArgument(
            f"the source {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'no options'}"
        )
    missing = [key for key, told in known.items() if told.default is told.empty and key not in options]
    if missing:
        raise InvalidArgument(f"the source {name} needs the option {', '.join(missing)}")
    return kind(**given, **options)
