"""Where queries stand: in their window, and towards a memory whose keys all stand at its first token."""

from __future__ import annotations

from torch import Tensor

from model_worker.positions.rope import Angles, Rope, rotate
from model_worker.positions.self_extend import far_queries, query_scale
from model_worker.settings import FotConfig, MemoryPosition, SelfExtend


class Policy:
    """The position rule of one kind of layer. Keys and queries come un-rotated; nothing stored depends on it."""

    def __init__(self, rope: Rope, fot: FotConfig, self_extend: SelfExtend | None, rotates: bool = True):
        """`rotates` is false for memory layers with mem_positionals=False; `self_extend` knows its scale_base."""
        self.rope = rope
        self.self_extend = self_extend if rotates else None
        self.rotates = rotates
        self._towards = fot.memory_position if rotates else MemoryPosition.NONE
        self._fixed = fot.fixed_position

    def angles(self, positions: Tensor, like: Tensor) -> Angles:
        """The angles of these positions, in the dtype of `like`."""
        return self.rope.angles(positions, like.dtype)

    def angles_if_rotating(self, positions: Tensor, like: Tensor) -> Angles | None:
        """The same, or None for a layer that rotates nothing."""
        return self.angles(positions, like) if self.rotates else None

    def turned(self, x: Tensor, angles: Angles | None) -> Tensor:
        """Queries or keys [B, heads, n, D] rotated, if this kind of layer rotates."""
        return x if angles is None else rotate(x, angles)

    def towards_memory(self, query: Tensor, positions: Tensor) -> Tensor:
        """Queries rotated to where they see the memory's keys from (FoT: keys at the window's first token)."""
        query = self._sharpened(query, positions)
        if self._towards is MemoryPosition.NONE:
            return query
        if self._towards is MemoryPosition.FIXED:
            positions = positions.new_full((1,), self._fixed)
        elif self.self_extend is not None:
            near = positions < self.self_extend.window
            positions = positions.where(near, far_queries(positions, self.self_extend))
        return self._as_if_keys_were_rotated(rotate(query, self.angles(positions, query)))

    def _sharpened(self, query: Tensor, positions: Tensor) -> Tensor:
        # As Self-Extend does in the window, when its logits are scaled.
        scale = None if self.self_extend is None else query_scale(positions, self.self_extend)
        if scale is None:
            return query
        return query * (scale[:, None, :, None] if scale.ndim == 2 else scale[:, None]).to(query.dtype)

    def _as_if_keys_were_rotated(self, query: Tensor) -> Tensor:
        # RoPE at position 0 is the identity but for the scaling of variants such as YaRN, which the stored keys lack.
        if self.rope.scaling == 1:
            return query
        dims = self.rope.rotary_dims
        query = query.clone()
        query[..., :dims] *= self.rope.scaling
        return query
