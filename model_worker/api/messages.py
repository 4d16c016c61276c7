"""What crosses gRPC, to and from what the worker knows."""

from __future__ import annotations

import math

from memory_service import ALL_DOCUMENTS, DocumentInfo, MemoryInfo
from memory_service.errors import InvalidArgument
from memory_service.types.conditions import Scalar
from model_worker.answering.answers import Sampling
from model_worker.api.worker import Look
from model_worker.recall.sources import TELLING, Sources, Telling
from model_worker.serving.requests import Finish, Finished
from model_worker.v1 import model_worker_pb2 as pb

NEW_TOKENS = 256  # Where a request does not say.
_REASONS = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


def read_sampling(options: pb.Options) -> Sampling:
    """How the next token is chosen. Raises InvalidArgument."""
    return Sampling(
        temperature=_finite(options.temperature, "temperature"),
        top_p=options.top_p if options.HasField("top_p") else 1.0,
        top_k=options.top_k,
        repetition_penalty=options.repetition_penalty if options.HasField("repetition_penalty") else 1.0,
        seed=options.seed if options.HasField("seed") else None,
    )


def read_look(look: pb.Look) -> Look:
    """What of the memory may be seen."""
    documents = look.told_documents if look.HasField("told_documents") else TELLING.documents
    passages = look.told_passages if look.HasField("told_passages") else TELLING.passages
    return Look(
        collection=look.collection,
        documents=tuple(look.documents.ids) if look.HasField("documents") else ALL_DOCUMENTS,
        where=look.filter or None,
        top_k=look.top_k,
        engine=look.engine or "auto",
        search={name: _finite(value, "search") for name, value in look.search.items()},
        logit_gap=_finite(look.logit_gap, "logit_gap") if look.HasField("logit_gap") else None,
        min_coverage=look.min_coverage if look.HasField("min_coverage") else 1.0,
        telling=Telling(documents, passages),
    )


def read_metadata(values: dict[str, pb.Scalar]) -> dict[str, Scalar]:
    """Metadata of a document. Raises InvalidArgument for a value that says nothing."""
    read: dict[str, Scalar] = {}
    for name, value in values.items():
        kind = value.WhichOneof("value")
        if kind is None:
            raise InvalidArgument(f"metadata {name!r} has no value", field="metadata")
        read[name] = getattr(value, kind)
    return read


def write_document(info: DocumentInfo) -> pb.Document:
    """A committed document."""
    return pb.Document(
        id=info.id, tokens=info.tokens, metadata={name: _scalar(value) for name, value in info.metadata.items()}
    )


def write_collection(info: MemoryInfo) -> pb.Collection:
    """A collection as it is now."""
    return pb.Collection(name=info.name, documents=info.documents, tokens=info.tokens)


def write_finished(finished: Finished) -> pb.Finished:
    """The end of an answer."""
    return pb.Finished(
        reason=_REASONS[finished.reason],
        prompt_tokens=finished.prompt_tokens,
        cached_tokens=finished.cached_tokens,
        completion_tokens=finished.completion_tokens,
        sources=_sources(finished.sources),
    )


def _sources(sources: Sources) -> pb.Sources:
    documents = [
        pb.SourceDocument(
            id=one.document,
            share=one.mass,
            tokens=one.tokens,
            passages=[
                pb.SourcePassage(first_token=part.first_token, tokens=part.tokens, share=part.mass, text=part.text)
                for part in one.passages
            ],
        )
        for one in sources.documents
    ]
    return pb.Sources(
        documents=documents,
        window_share=sources.window_mass,
        session_share=sources.session_mass,
        other_share=sources.other_mass,
        coverage=sources.coverage,
        searched_tokens=sources.searched_tokens,
        engine=sources.engine,
    )


def _scalar(value: Scalar) -> pb.Scalar:
    match value:
        case bool():
            return pb.Scalar(flag=value)
        case int():
            return pb.Scalar(integer=value)
        case float():
            return pb.Scalar(number=value)
        case _:
            return pb.Scalar(text=value)


def _finite(value: float, field: str) -> float:
    if not math.isfinite(value):
        raise InvalidArgument(f"{field} must be a finite number", field=field)
    return value
