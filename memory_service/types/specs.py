"""What all documents and sessions of a memory have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from memory_service.errors import InvalidArgument, WrongModel

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 256
MAX_KV_HEADS = 1024
MAX_HEAD_DIM = 1024


class DType(StrEnum):
    """How keys and values are stored."""

    BF16 = "bf16"
    F16 = "f16"
    F32 = "f32"

    @property
    def torch(self) -> torch.dtype:
        return _torch_of(self)

    @property
    def itemsize(self) -> int:
        return self.torch.itemsize


@cache
def _torch_of(dtype: DType) -> torch.dtype:
    import torch  # It takes seconds, which a command that computes nothing should not.

    return {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}[dtype]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Which model made the keys and values. Two fingerprints match only if all four fields are equal."""

    model: str
    revision: str = ""
    weights: str = ""  # Hex digest of the weights that make keys and values.
    rope: str = ""  # Canonical JSON of the RoPE parameters.


@dataclass(frozen=True, slots=True)
class IndexPolicy:
    """When and how a memory is indexed. Quality of the index is never part of durability."""

    factory: str = "auto"  # A Faiss index_factory string, "auto" (chosen by size) or "none" (always exact).
    min_tokens: int = 65_536  # Unindexed tokens that start a background build.


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """What every document and session of a memory has in common."""

    fingerprint: Fingerprint
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: DType = DType.BF16
    index: IndexPolicy = field(default_factory=IndexPolicy)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, all layers and heads."""
        return len(self.layers) * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def check(self) -> None:
        """Raise InvalidArgument unless every field is within its limits."""
        if not self.layers or len(self.layers) > MAX_LAYERS:
            raise InvalidArgument(f"a memory needs 1 to {MAX_LAYERS} memory layers, got {len(self.layers)}")
        if any(layer < 0 for layer in self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise InvalidArgument(f"layers must be distinct, ascending and ≥ 0, got {list(self.layers)[:8]}")
        if not 1 <= self.kv_heads <= MAX_KV_HEADS:
            raise InvalidArgument(f"kv_heads must be 1 to {MAX_KV_HEADS}, got {self.kv_heads}")
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise InvalidArgument(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {self.head_dim}")
        if not self.fingerprint.model or len(self.fingerprint.model) > 256:
            raise InvalidArgument("fingerprint.model must name the model in 1 to 256 characters")
        if self.index.min_tokens < 1:
            raise InvalidArgument(f"index.min_tokens must be ≥ 1, got {self.index.min_tokens}")

    def check_model(self, fingerprint: Fingerprint) -> None:
        """Raise WrongModel unless `fingerprint` is the memory's own."""
        if fingerprint != self.fingerprint:
            raise WrongModel(
                f"this memory holds keys and values of {self.fingerprint}, the call carries {fingerprint}; "
                "encode the documents again with the memory's model, or create another memory"
            )

    def layer_index(self, layer: int) -> int:
        """Where `layer` stands in the stored tensors."""
        try:
            return self.layers.index(layer)
        except ValueError:
            raise InvalidArgument(f"layer {layer} is not kept by this memory; it keeps {list(self.layers)}") from None
