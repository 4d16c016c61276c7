"""The private memory of one prompt or conversation, for asyncio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor

from memory_service.client.arguments import TokenIds, append_of
from memory_service.client.scopes import ScopeLike, session_scope
from memory_service.errors import FotError
from memory_service.filters import Where
from memory_service.types.answers import Attended, Fetched
from memory_service.types.questions import Engine
from memory_service.types.scopes import SessionScope
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.specs import DType
from memory_service.verbs import CloseSession, RenewSession

if TYPE_CHECKING:
    from memory_service.client.async_memory import AsyncMemory


class AsyncSession:
    """The private memory of one prompt or conversation. For one task at a time."""

    def __init__(self, memory: AsyncMemory, info: SessionInfo):
        self._memory = memory
        self.info = info

    @property
    def id(self) -> str:
        """The service's name for this session."""
        return self.info.id

    @property
    def scope(self) -> SessionScope:
        """All tokens of this session, as part of a scope."""
        return SessionScope(self.id)

    def until(self, token: int) -> SessionScope:
        """The tokens before offset `token`, as part of a scope."""
        return SessionScope(self.id, token)

    def length(self, layer: int) -> int:
        """Tokens this layer holds."""
        return self.info.tokens[self._memory.spec.layer_index(layer)]

    def piece(
        self,
        layers: int | Sequence[int],
        keys: Tensor,
        values: Tensor,
        token_ids: TokenIds = None,
        first_token: int | None = None,
    ) -> SessionAppend:
        """An append at the present length, for `AsyncMemory.append_sessions`. Shapes as in `append`."""
        return append_of(self.info, self._memory.spec, layers, keys, values, token_ids, first_token)

    async def append(
        self,
        layers: int | Sequence[int],
        keys: Tensor,
        values: Tensor,
        *,
        token_ids: TokenIds = None,
        first_token: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Append tokens, visible at once: keys and values [H, T, D] of one layer or [layers, H, T, D] of several.

        They go to the end, or to `first_token`, which must be the end unless an earlier append is repeated.
        Raises SessionExpired if the lease ran out, InvalidArgument, ResourceExhausted if there is no room.
        """
        piece = self.piece(layers, keys, values, token_ids, first_token)
        await self._memory.append_sessions([piece], timeout_s=timeout_s)

    async def attend(
        self,
        layer: int,
        queries: Tensor,
        *,
        until: int | None = None,
        documents: ScopeLike = None,
        where: Where = None,
        top_k: int = 0,
        engine: str = Engine.AUTO,
        scale: float | None = None,
        logit_gap: float | None = None,
        search: Mapping[str, float] | None = None,
        tokens: bool = False,
        attribution: bool = False,
        measure: bool = False,
        output_dtype: str = DType.F32,
        timeout_s: float | None = None,
    ) -> Attended:
        """Attention over this session's tokens before `until`, and over `documents` or those that match `where`.

        `documents=ALL_DOCUMENTS` adds all of them. The rest is as in `AsyncMemory.attend`.
        """
        return await self._memory.attend(
            layer,
            queries,
            scope=session_scope(SessionScope(self.id, until), documents),
            where=where,
            top_k=top_k,
            engine=engine,
            scale=scale,
            logit_gap=logit_gap,
            search=search,
            tokens=tokens,
            attribution=attribution,
            measure=measure,
            output_dtype=output_dtype,
            timeout_s=timeout_s,
        )

    async def fetch(
        self, layer: int, first_token: int = 0, tokens: int = 1, *, timeout_s: float | None = None
    ) -> Fetched:
        """Raw keys and values of consecutive tokens of this session."""
        return await self._memory.fetch(f"session:{self.id}", layer, first_token, tokens, timeout_s=timeout_s)

    async def renew(self) -> None:
        """Start the lease anew, as every other use does. Raises SessionExpired."""
        self.info = await self._memory.connection.run(RenewSession(self._memory.name, self.id))

    async def close(self) -> None:
        """Forget the session and free its bytes. Harmless twice."""
        await self._memory.connection.run(CloseSession(self._memory.name, self.id))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            await self.close()
        except FotError:
            # The lease frees the session anyway; the error of the body tells more than that of closing.
            if error is None:
                raise

    def __repr__(self) -> str:
        tokens = f"{max(self.info.tokens, default=0):,} tokens"
        return f"<{type(self).__name__} {self.id} of memory {self._memory.name!r}: {tokens}>"
