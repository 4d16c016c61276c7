"""What callers may write, turned into the nouns that travel; shared by the sync and the async client."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from memory_service.client.scopes import ScopeLike, scope_of
from memory_service.errors import AlreadyExists, InvalidArgument
from memory_service.types.conditions import Scalar
from memory_service.types.documents import Conflict, Document
from memory_service.types.memories import MemoryInfo
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.specs import DType, Fingerprint, MemorySpec
from memory_service.verbs import PutDocument

if TYPE_CHECKING:
    from torch import Tensor

Word = TypeVar("Word", bound=StrEnum)

DENSE = AttendOptions()
TokenIds: TypeAlias = "Tensor | Sequence[int] | None"
UPLOAD_BYTES_PER_S = 8 << 20  # A put may take this much longer than other calls, so that large documents fit a default.


def word(kind: type[Word], given: str) -> Word:
    """The member of an enumeration that a caller wrote as text. Raises InvalidArgument with the choices."""
    try:
        return kind(given)
    except ValueError:
        raise InvalidArgument(f"{given!r} is not one of {', '.join(kind)}") from None


def fresh_request_id() -> str:
    """A fresh id that lets the service recognise a repeated call."""
    return uuid.uuid4().hex


def token_tensor(token_ids: TokenIds) -> Tensor | None:
    """Token ids as an int64 tensor [T]."""
    import torch  # Whoever has tensors has it already; fot --help does not wait for it.

    if token_ids is None or isinstance(token_ids, torch.Tensor):
        return token_ids
    try:
        return torch.tensor(token_ids, dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InvalidArgument("token_ids must be whole numbers, one a token") from None


def stored(tensor: Tensor, spec: MemorySpec) -> Tensor:
    """Keys or values in the memory's dtype; a float tensor of another one is rounded to it."""
    if not tensor.is_floating_point():
        raise InvalidArgument(f"keys and values must be floating point, got {tensor.dtype}")
    return tensor.detach().to(spec.dtype.torch)


def put_of(
    memory: str,
    spec: MemorySpec,
    document_id: str,
    keys: Tensor,
    values: Tensor,
    token_ids: TokenIds,
    metadata: Mapping[str, Scalar] | None,
    replace: bool,
    fingerprint: Fingerprint | None,
    request_id: str | None,
) -> PutDocument:
    """The verb that stores one document."""
    document = Document(
        document_id, stored(keys, spec), stored(values, spec), token_tensor(token_ids), dict(metadata or {})
    )
    if keys.ndim != 4:
        raise InvalidArgument(f"keys must be [layers, kv heads, tokens, head_dim], got shape {list(keys.shape)}")
    conflict = Conflict.REPLACE if replace else Conflict.FAIL
    return PutDocument(memory, document, fingerprint or spec.fingerprint, conflict, request_id or fresh_request_id())


def put_timeout_s(verb: PutDocument, timeout_s: float) -> float:
    """The default time of a put: that of any call, and the time its bytes need on a slow line."""
    return timeout_s + (verb.document.keys.nbytes + verb.document.values.nbytes) / UPLOAD_BYTES_PER_S


def append_of(
    info: SessionInfo,
    spec: MemorySpec,
    layers: int | Sequence[int],
    keys: Tensor,
    values: Tensor,
    token_ids: TokenIds,
    first_token: int | None,
) -> SessionAppend:
    """An append at the layers' present length; one layer's tensors may come without the leading dimension."""
    if isinstance(layers, int):
        layers, keys, values = (layers,), _as_one_layer(keys), _as_one_layer(values)
    if first_token is None:
        lengths = {layer: info.tokens[spec.layer_index(layer)] for layer in layers}
        if len(set(lengths.values())) > 1:
            raise InvalidArgument(f"the layers hold different numbers of tokens ({lengths}); append to them one by one")
        first_token = next(iter(lengths.values()), 0)
    keys, values = stored(keys, spec), stored(values, spec)
    return SessionAppend(info.id, tuple(layers), first_token, keys, values, token_tensor(token_ids))


def _as_one_layer(tensor: Tensor) -> Tensor:
    return tensor[None] if tensor.ndim == 3 else tensor


def groups_of(groups: Iterable[AttendGroup | tuple[ScopeLike, Tensor]]) -> tuple[AttendGroup, ...]:
    """Groups of queries, given as `AttendGroup` or as (scope, queries)."""
    return tuple(
        group if isinstance(group, AttendGroup) else AttendGroup(scope_of(group[0]), group[1]) for group in groups
    )


def options_of(
    *,
    top_k: int,
    engine: str = Engine.AUTO,
    scale: float | None = None,
    logit_gap: float | None = None,
    search: Mapping[str, float] | None = None,
    tokens: bool = False,
    attribution: bool = False,
    measure: bool = False,
    output_dtype: str = DType.F32,
) -> AttendOptions:
    """How to attend. Raises InvalidArgument for a word that is no engine or dtype."""
    return AttendOptions(
        top_k=top_k,
        engine=word(Engine, engine),
        scale=scale,
        logit_gap=logit_gap,
        search=dict(search or {}),
        tokens=tokens,
        attribution=attribution,
        measure=measure,
        output_dtype=word(DType, output_dtype),
    )


def check_same_spec(info: MemoryInfo, wanted: MemorySpec) -> None:
    """Raise WrongModel or AlreadyExists, saying what differs, unless the memory has the wanted spec."""
    info.spec.check_model(wanted.fingerprint)
    names = ("layers", "kv_heads", "head_dim", "dtype", "index")
    differing = [name for name in names if getattr(info.spec, name) != getattr(wanted, name)]
    if differing:
        told = "; ".join(f"{n} is {getattr(info.spec, n)!s}, not {getattr(wanted, n)!s}" for n in differing)
        raise AlreadyExists(f"memory {info.name!r} exists with another spec: {told}")


def describe(spec: MemorySpec) -> str:
    """A spec in a few words."""
    numbers = ", ".join(map(str, spec.layers))
    layers = f"{len(spec.layers)} layers" if len(spec.layers) > 6 else f"layer{'s'[: len(spec.layers) > 1]} {numbers}"
    return f"{spec.fingerprint.model}, {layers}, {spec.kv_heads} × {spec.head_dim}, {spec.dtype}"
