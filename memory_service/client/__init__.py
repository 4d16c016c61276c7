"""The typed client: the same verbs and errors in process, in a directory and over gRPC."""

from typing import TYPE_CHECKING

from memory_service.lazy import finder

if TYPE_CHECKING:
    from memory_service.client.async_client import AsyncClient
    from memory_service.client.async_memory import AsyncMemory
    from memory_service.client.async_session import AsyncSession
    from memory_service.client.client import Client
    from memory_service.client.memory import Memory
    from memory_service.client.scopes import ALL_DOCUMENTS, ScopeLike, scope_of
    from memory_service.client.session import Session
    from memory_service.places.targets import Tls

__all__ = [
    "ALL_DOCUMENTS",
    "AsyncClient",
    "AsyncMemory",
    "AsyncSession",
    "Client",
    "Memory",
    "ScopeLike",
    "Session",
    "Tls",
    "scope_of",
]

if not TYPE_CHECKING:
    _HOMES = ("scopes", "async_session", "session", "async_memory", "memory", "async_client", "client")
    __getattr__ = finder(__name__, __all__, ["memory_service.places.targets", *(f"{__name__}.{one}" for one in _HOMES)])
