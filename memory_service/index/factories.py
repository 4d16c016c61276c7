"""Index factory strings: which are allowed, which suit how many keys, and what they cost. Pure; no Faiss.

Only a small part of Faiss's grammar is let through, with bounds on every number: a string comes from whoever creates a
memory, and `IVF2000000000,Flat` must not allocate anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from memory_service.errors import InvalidArgument
from memory_service.types.specs import MemorySpec

MAX_LISTS = 16_384
MAX_PARAM = 65_536
PARAMS = ("nprobe", "efSearch", "candidates")
OUTLIER_SHARE = 1 / 128  # Of the keys, kept apart from the lists and scored exactly, …
MAX_OUTLIERS = MAX_LISTS  # … but no more: at every query they cost what choosing among as many lists does.

# Only the first kind may stand without lists: Faiss cannot restrict the second to a scope then.
_FACTORY = re.compile(
    r"(?:IVF(?P<lists>[1-9]\d{0,4}),)?(?P<codec>Flat|SQ[468]|SQfp16|SQbf16|"
    r"(?(lists)RaBitQ|(?!))|(?(lists)PQ(?P<parts>[1-9]\d{0,3})(?:x(?P<bits>[48]))?(?P<fast>fsr?)?|(?!)))"
    r"|HNSW(?P<links>[4-9]|[1-9]\d)"
)
_BITS = {"Flat": 32, "SQ4": 4, "SQ6": 6, "SQ8": 8, "SQfp16": 16, "SQbf16": 16, "RaBitQ": 1}


@dataclass(frozen=True, slots=True)
class Factory:
    """A factory string, read."""

    lists: int  # 0: none.
    codec: str  # "HNSW32" for a graph.
    code_bytes: int  # Of one key, without its id.

    @property
    def text(self) -> str:
        return f"IVF{self.lists},{self.codec}" if self.lists else self.codec

    @property
    def coarse(self) -> bool:
        """True if scores by code are too rough to trust among near equals."""
        return self.codec.startswith(("PQ", "RaBitQ", "SQ4"))


def parse_factory(factory: str, dim: int) -> Factory:
    """Read a factory string for keys of `dim`; InvalidArgument if it is not one this service builds."""
    shape = _FACTORY.fullmatch(factory)
    if shape is None or int(shape["lists"] or 1) > MAX_LISTS:
        raise InvalidArgument(
            f"index factory {factory!r} is not supported; use 'auto', 'none', HNSW4 to HNSW99, or one of Flat, SQ4, "
            f"SQ6, SQ8, SQfp16, SQbf16, alone or behind 'IVFn,' with n ≤ {MAX_LISTS}, or one of RaBitQ, PQm, PQmx4fs, "
            "PQmx4fsr behind 'IVFn,'"
        )
    if shape["links"]:
        return Factory(0, factory, 4 * dim + 8 * int(shape["links"]))
    parts = int(shape["parts"] or 0)
    bits = int(shape["bits"] or 8)
    if parts and (dim % parts or (shape["fast"] and bits != 4)):
        raise InvalidArgument(
            f"index factory {factory!r} does not fit: m of PQm must divide head_dim {dim}, and fs and fsr follow x4"
        )
    code_bytes = parts * bits if parts else dim * _BITS[shape["codec"]]
    return Factory(int(shape["lists"] or 0), shape["codec"], (code_bytes + 7) // 8)


def check_factory(factory: str, dim: int) -> None:
    """Raise InvalidArgument unless `factory` is "auto", "none" or a factory string this service builds."""
    if factory not in ("auto", "none"):
        parse_factory(factory, dim)


def check_params(params: Mapping[str, float]) -> None:
    """Raise InvalidArgument unless `params` holds only nprobe, efSearch and candidates, whole numbers ≥ 1."""
    for name, value in params.items():
        if name not in PARAMS:
            raise InvalidArgument(f"unknown search parameter {name!r}; known are {', '.join(PARAMS)}")
        if not 1 <= value <= MAX_PARAM or value != int(value):
            raise InvalidArgument(f"search parameter {name} must be a whole number from 1 to {MAX_PARAM}, got {value}")


def choose_factory(tokens: int, dim: int, policy_factory: str) -> str:
    """The factory for a unit of `tokens`: the policy's own, or for "auto" the best that was measured."""
    if policy_factory != "auto":
        return parse_factory(policy_factory, dim).text
    if tokens < 1024:
        return "Flat"
    # 4·sqrt(n) lists, a power of two: choosing lists then costs about as much as reading them.
    return f"IVF{min(1 << ((16 * tokens).bit_length() - 1) // 2, MAX_LISTS)},PQ{dim}x4fsr"


def outlier_count(tokens: int) -> int:
    """About how many of so many keys are kept apart."""
    return min(int(tokens * OUTLIER_SHARE), MAX_OUTLIERS)


def default_candidates(factory: str, dim: int, top_k: int) -> int:
    """How many candidates to score again so that the codes' rounding costs little recall at `top_k`."""
    return max(3 * top_k, 64) if parse_factory(factory, dim).coarse else top_k + max(top_k // 4, 8)


def estimate_bytes(tokens: int, spec: MemorySpec, factory: str) -> int:
    """About how many bytes an index of `tokens` takes, all layers and heads, in RAM and on disk."""
    shape = parse_factory(choose_factory(tokens, spec.head_dim, factory), spec.head_dim)
    apart = outlier_count(tokens) + 2 * shape.lists if shape.lists else 0
    per_head = tokens * (shape.code_bytes + 8) + apart * 4 * spec.head_dim
    return len(spec.layers) * spec.kv_heads * per_head
