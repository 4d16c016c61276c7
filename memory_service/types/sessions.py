"""Sessions: the tokens of one prompt or conversation.

L memory layers, H key/value heads, T tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_service.types.brief import brief

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """The private, ephemeral memory of one prompt or conversation."""

    id: str
    memory: str
    lease_s: float
    expires_at: float
    tokens: tuple[int, ...]  # Per memory layer, in the spec's order.


@dataclass(frozen=True, slots=True, eq=False)
class SessionAppend:
    """Tokens for a session. `first_token` must be the layers' present length; repeating an append is harmless."""

    session: str
    layers: tuple[int, ...]
    first_token: int
    keys: Tensor  # [len(layers), H, T, D]
    values: Tensor  # [len(layers), H, T, D]
    token_ids: Tensor | None = None  # [T]

    __repr__ = brief
