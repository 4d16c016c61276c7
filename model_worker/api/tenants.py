"""The memories of every tenant, each reached with the tenant's own token."""

from __future__ import annotations

import threading
from pathlib import Path

from memory_service import Client, Memory, MemorySpec, NotFound, PermissionDenied, Tls, Unauthenticated
from memory_service.server.auth import EVERYONE
from memory_service.types.callers import Identity
from memory_service.types.names import check_name
from model_worker.api.keys import Keys

TIMEOUT_S = 60.0
_SCHEMES = ("grpc://", "grpcs://", "unix:", "ray://")


class Tenants:
    """Clients of the memory service by tenant; memories stay the same objects, so that calls to one can be joined.

    All methods may block and may be called from any thread.
    """

    def __init__(
        self,
        target: str | Path,
        keys: Keys,
        *,
        tls: Tls | None = None,
        insecure: bool = False,
        timeout_s: float = TIMEOUT_S,
    ):
        self._target = target
        self._keys = keys
        self._tls, self._insecure, self._timeout_s = tls, insecure, timeout_s
        self._shared = not str(target).startswith(_SCHEMES)  # In this process: it knows no tenants.
        self._lock = threading.Lock()
        self._clients: dict[str, Client] = {}
        self._memories: dict[tuple[str, str], Memory] = {}

    def client(self, identity: Identity) -> Client:
        """The caller's memories. Raises PermissionDenied for a tenant without a memory token."""
        tenant = identity.tenant
        token = self._keys.memory_token(tenant)
        if self._shared and tenant != EVERYONE.tenant:
            raise PermissionDenied("this worker keeps its memory in its own process, which is for one tenant")
        with self._lock:
            if tenant not in self._clients:
                self._clients[tenant] = Client.open(
                    self._target, token=token, tls=self._tls, insecure=self._insecure, timeout_s=self._timeout_s
                )
            return self._clients[tenant]

    def memory(self, identity: Identity, name: str, spec: MemorySpec | None = None) -> Memory:
        """A collection of the caller; with a spec it is created if there is none. One round trip.

        Raises NotFound, also for what belongs to another tenant, and InvalidArgument for what cannot be a name.
        """
        check_name(name, "a collection")
        client = self.client(identity)
        key = (identity.tenant, name)
        try:
            info = client.connection.find_memory(name, spec)
        except NotFound:
            with self._lock:
                self._memories.pop(key, None)
            raise NotFound(f"there is no collection {name!r}", reason="COLLECTION_NOT_FOUND") from None
        except Unauthenticated as error:
            self._forget(identity.tenant)
            raise worker_fault(error) from None
        with self._lock:
            held = self._memories.get(key)
            if held is None or held.spec != info.spec or held.connection is not client.connection:
                held = self._memories[key] = Memory(client.connection, info, owner=False)
            return held

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
            self._memories.clear()
        for client in clients:
            client.close()

    def _forget(self, tenant: str) -> None:
        """Read the tenant's token anew at the next call."""
        with self._lock:
            self._clients.pop(tenant, None)


def worker_fault(error: Exception) -> Exception:
    """An error as the caller should see it: a memory token that was refused is not the caller's key."""
    if isinstance(error, Unauthenticated):
        return PermissionDenied("the memory service refuses this tenant's token; the operator has to renew it")
    return error
