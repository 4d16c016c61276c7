"""What attention means in one pass: loading windows into memory, or going on in the window that a row keeps.

Both merge the same two partials: the window's own, and what the memory answers for the queries that may see it.
B batch rows, H query heads, K key/value heads, n queries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from memory_service import Attended, Partial, merge
from model_worker.attention import grouped, local
from model_worker.decoder.window import Window
from model_worker.hf.decoder import Call, Filled
from model_worker.positions.policy import Policy
from model_worker.recall.reader import Promise


@dataclass(frozen=True, slots=True)
class Piece:
    """A window of a long text, on its way into memory."""

    row: int  # Which text.
    start: int  # Its first token in the text.
    stop: int
    fresh: int  # The first token that memory does not hold yet; before it, recomputed left context.

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def kept(self) -> slice:
        """Which of the window's tokens are stored."""
        return slice(self.fresh - self.start, self.tokens)


class Store(Protocol):
    """Where the keys and values of loaded windows go, and where later layers read them."""

    def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
        """Keep what is fresh of keys and values [B, K, n, D], one batch row per piece, padded on the right."""

    def attend(self, layer: int, pieces: Sequence[Piece], queries: Tensor, scale: float) -> Promise[Partial] | None:
        """Attention of queries [B, H, n, D] to what stands before each piece; None if nothing does."""


class LoadStep:
    """Windows side by side, each seeing itself and, in memory layers, what its text has in memory before it."""

    def __init__(
        self,
        pieces: Sequence[Piece],
        policies: Sequence[Policy],
        mem_layers: Sequence[int],
        store: Store | None,
        stop_after: int | None,
    ):
        """`stop_after`: the layer whose keys and values are the last ones wanted; None runs on to the logits."""
        self._pieces = pieces
        self._policies = policies
        self._mem_layers = frozenset(mem_layers)
        self._store = store
        self._stop_after = stop_after

    def attend(self, call: Call) -> Tensor:
        """Append, ask, attend in the window, merge."""
        policy = self._policies[call.layer]
        far: Promise[Partial] | None = None
        positions = torch.arange(call.query.shape[2], device=call.query.device)
        store = self._store if call.layer in self._mem_layers else None
        if store is not None:
            store.append(call.layer, self._pieces, call.key, call.value)
        if call.layer == self._stop_after:
            raise Filled
        if store is not None:
            far = store.attend(call.layer, self._pieces, policy.towards_memory(call.query, positions), call.scale)
        near = _window(policy, call, positions)
        return joined(near, far.result() if far is not None else None, call.query.dtype)


def _window(policy: Policy, call: Call, positions: Tensor) -> Partial:
    """Causal attention among a window's own tokens; pads stand on the right, where no real query looks."""
    if policy.self_extend is not None:
        return grouped.prefill(
            call.query, call.key, call.value, policy.rope, policy.self_extend, call.scale, softcap=call.softcap
        )
    angles = policy.angles_if_rotating(positions, call.query)
    query, key = (policy.turned(x, angles) for x in (call.query, call.key))
    return local.causal(query, key, call.value, call.scale, softcap=call.softcap, sliding=call.sliding)


class Memories(Protocol):
    """The memory as the rows that go on see it."""

    def ask(self, layer: int, queries: Tensor, scale: float) -> Promise[tuple[Attended | None, ...]] | None:
        """Attention of queries [B, H, n, D] over each row's scope, padding left out; None if no row sees anything."""

    def told(self, layer: int, near: Partial, answers: Sequence[Attended | None]) -> Partial:
        """The answers as a partial [B, H, n, D], told to whoever listens."""


class WindowStep:
    """The next tokens of every row, seeing their window and, in memory layers, their memory."""

    def __init__(self, window: Window, mem_layers: Sequence[int], memories: Memories):
        self._window = window
        self._mem_layers = frozenset(mem_layers)
        self._memories = memories

    def attend(self, call: Call) -> Tensor:
        """Push, ask, attend in the window, merge."""
        window, policy = self._window, self._window.policies[call.layer]
        query, count = call.query, call.query.shape[2]
        positions = window.positions(window.slots, window.slots + count)
        far = None
        if call.layer in self._mem_layers:
            far = self._memories.ask(call.layer, policy.towards_memory(query, positions), call.scale)
        visible = window.push(call.layer, call.key, call.value)
        if policy.self_extend is not None and visible.far is not None:
            near = grouped.trailing_rotated(
                query,
                visible.near,
                visible.far,
                visible.value,
                policy.rope,
                policy.self_extend,
                call.scale,
                positions=positions,
                first=visible.first,
                softcap=call.softcap,
            )
        else:
            turned = policy.turned(query, window.query_angles(policy, count, query) if policy.rotates else None)
            near = local.trailing(
                turned,
                visible.near,
                visible.value,
                call.scale,
                first=visible.first,
                softcap=call.softcap,
                sliding=call.sliding,
            )
        found = None if far is None else self._memories.told(call.layer, near, far.result())
        return joined(near, found, query.dtype)


def spread(answers: Sequence[Attended | None], spans: Sequence[slice], like: Partial) -> Partial:
    """Answers [H, n, D], one per row, at their place among a batch's queries; elsewhere nothing was seen."""
    count = like.output.shape[2]
    if all(one is not None and span == slice(0, count) for one, span in zip(answers, spans, strict=True)):
        found = [one for one in answers if one is not None]
        partial = Partial(torch.stack([one.output for one in found]), torch.stack([one.lse for one in found]))
        return Partial(partial.output.to(like.output.device), partial.lse.to(like.output.device))
    output = torch.zeros_like(like.output, dtype=torch.float32)
    lse = torch.full_like(like.lse, -torch.inf)
    for row, (one, span) in enumerate(zip(answers, spans, strict=True)):
        if one is not None:
            output[row, :, span], lse[row, :, span] = one.output.to(output), one.lse.to(lse)
    return Partial(output, lse)


def joined(near: Partial, far: Partial | None, dtype: torch.dtype) -> Tensor:
    """One softmax over the window and the memory: [B, H, n, D]."""
    if far is None:
        return near.output
    whole = merge([Partial(near.output.float(), near.lse), far])
    return whole.output.to(dtype)
