"""Sessions: the private, ephemeral memories of long prompts and conversations. RAM only, with a lease."""

from __future__ import annotations

import re
import secrets
import threading
import time

import torch
from torch import Tensor

from memory_service.attention.exact import is_finite
from memory_service.attention.slabs import Run, Slab, clip, slab_rows
from memory_service.errors import InvalidArgument, QuotaExceeded, ResourceExhausted, SessionExpired
from memory_service.settings import StoreOptions
from memory_service.types.sessions import SessionAppend, SessionInfo
from memory_service.types.specs import MemorySpec

_NAME = re.compile(r"[A-Za-z0-9._-]{16,128}")


class Session:
    """Tokens of one session, every layer at its own length. One writer at a time, readers take no lock."""

    def __init__(
        self,
        tenant: str,
        memory: str,
        memory_key: str,
        spec: MemorySpec,
        lease_s: float,
        device: torch.device,
        name: str = "",
    ):
        self.id = name or secrets.token_urlsafe(18)  # Unguessable: who knows it owns it.
        self.tenant = tenant
        self.memory = memory
        self.memory_key = memory_key
        self.spec = spec
        self.lease_s = lease_s
        self.expires_at = 0.0
        self.slabs: list[Slab] = []
        self.tokens = [0] * len(spec.layers)
        self.lock = threading.Lock()
        self._device = device
        self.renew()

    @property
    def info(self) -> SessionInfo:
        return SessionInfo(self.id, self.memory, self.lease_s, self.expires_at, tuple(self.tokens))

    @property
    def nbytes(self) -> int:
        return sum(self.tokens) * (self.spec.bytes_per_token // len(self.spec.layers))

    def renew(self) -> None:
        self.expires_at = time.time() + self.lease_s

    def check(self, append: SessionAppend) -> list[int]:
        """Layer indexes of a valid append; InvalidArgument with the reason otherwise."""
        layers = [self.spec.layer_index(layer) for layer in append.layers]
        if not layers or len(set(layers)) != len(layers):
            raise InvalidArgument("an append names at least one layer, each once")
        shape = (
            len(layers),
            self.spec.kv_heads,
            append.keys.shape[2] if append.keys.ndim == 4 else -1,
            self.spec.head_dim,
        )
        for name, tensor in (("keys", append.keys), ("values", append.values)):
            if tuple(tensor.shape) != shape or shape[2] < 1:
                raise InvalidArgument(
                    f"{name} must be [{len(layers)} layers, {self.spec.kv_heads} kv heads, tokens ≥ 1, "
                    f"{self.spec.head_dim}], got {list(tensor.shape)}"
                )
            if tensor.dtype != self.spec.dtype.torch:
                raise InvalidArgument(f"{name} must be {self.spec.dtype.value} like the memory, got {tensor.dtype}")
            if not is_finite(tensor):
                raise InvalidArgument(f"{name} hold NaN or infinity; nothing was appended")
        if append.token_ids is not None:
            _check_ids(append.token_ids, shape[2])
        if append.first_token < 0:
            raise InvalidArgument(f"first_token must be ≥ 0, got {append.first_token}")
        lengths = {self.tokens[layer] for layer in layers}
        if len(lengths) > 1:
            raise InvalidArgument(f"the layers of one append must have equal lengths, they have {sorted(lengths)}")
        return layers

    def append(self, append: SessionAppend, layers: list[int]) -> None:
        """Add tokens to these layers (of `check`); what was appended before is skipped. Hold `lock`."""
        length, count = self.tokens[layers[0]], append.keys.shape[2]
        if append.first_token + count <= length:
            return  # A repeated append.
        if append.first_token != length:
            raise InvalidArgument(
                f"first_token is {append.first_token} but the layers hold {length} tokens; append at {length}"
            )
        capacity = slab_rows(self.spec)
        done = 0
        while done < count:
            place, first = divmod(length + done, capacity)
            if place == len(self.slabs):
                self.slabs.append(Slab(self.spec, capacity, self._device))
            size = min(count - done, capacity - first)
            piece = slice(done, done + size)
            ids = None if append.token_ids is None else append.token_ids[piece]
            self.slabs[place].write(layers, first, append.keys[:, :, piece], append.values[:, :, piece], ids)
            done += size
        for layer in layers:
            self.tokens[layer] = length + count

    def parts(self, layer: int, until: int | None) -> list[tuple[Slab, tuple[Run, ...], int]]:
        """Rows of a layer (by index) below `until`: (slab, runs, token of the slab's first row)."""
        length = self.tokens[layer] if until is None else min(until, self.tokens[layer])
        found: list[tuple[Slab, tuple[Run, ...], int]] = []
        capacity = slab_rows(self.spec)
        for place, slab in enumerate(self.slabs):
            first = place * capacity
            if first < length:
                found.append((slab, clip(((0, capacity),), length - first), first))
        return found

    def spans(self, layer: int) -> list[tuple[Slab, Run]]:
        """Where the tokens of a layer (by index) stand, in order."""
        return [(slab, run) for slab, runs, _ in self.parts(layer, None) for run in runs]


def _check_ids(ids: Tensor, tokens: int) -> None:
    if tuple(ids.shape) != (tokens,) or ids.is_floating_point():
        raise InvalidArgument(f"token_ids must be {tokens} integers, got {ids.dtype} {list(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < 2**32:
        raise InvalidArgument("token_ids must be 0 to 2^32 - 1")


class Sessions:
    """All open sessions of a store: leases, and limits on number and bytes."""

    def __init__(self, options: StoreOptions, device: torch.device):
        self._options = options
        self._device = device
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}
        self._reserved = 0  # Bytes of appends under way.

    def open(
        self, tenant: str, memory: str, memory_key: str, spec: MemorySpec, lease_s: float, name: str = ""
    ) -> Session:
        """Open a session, under a name of the caller's own if there is one; QuotaExceeded if the tenant has too many.

        The same name again gives the same session, so that several processes can each be asked for it.
        """
        if name and not _NAME.fullmatch(name):
            raise InvalidArgument("a session's id is 16 to 128 letters, digits, '.', '_' or '-'")
        if not 1.0 <= lease_s <= self._options.max_lease_s:
            raise InvalidArgument(f"lease_s must be 1 to {self._options.max_lease_s:g} seconds, got {lease_s:g}")
        session = Session(tenant, memory, memory_key, spec, lease_s, self._device, name)
        with self._lock:
            self._expire()
            known = self._open.get(session.id)
            if known is not None:
                if known.tenant != tenant or known.memory_key != memory_key:
                    raise InvalidArgument("this session id is taken; make another")
                known.renew()
                return known
            if sum(one.tenant == tenant for one in self._open.values()) >= self._options.tenant_sessions:
                raise QuotaExceeded(
                    f"the tenant has {self._options.tenant_sessions} open sessions, which is its limit; close some"
                )
            self._open[session.id] = session
        return session

    def get(self, tenant: str, memory_key: str, session_id: str) -> Session:
        """An open session of this tenant and memory, its lease renewed; SessionExpired otherwise."""
        with self._lock:
            self._expire()
            session = self._open.get(session_id)
            if session is None or session.tenant != tenant or session.memory_key != memory_key:
                raise SessionExpired(
                    "no such session: it was closed, its lease ran out, or the service restarted; "
                    "open another and append the prompt again"
                )
            session.renew()
            return session

    def append(self, session: Session, append: SessionAppend) -> None:
        """Append if it is valid and fits; visible on return."""
        with session.lock:
            layers = session.check(append)
            size = append.keys.nbytes + append.values.nbytes
            with self._lock:
                self._expire()
                if self._reserved + size + self._used() > self._options.session_bytes:
                    raise ResourceExhausted(
                        f"sessions hold {self._used():,} of {self._options.session_bytes:,} bytes; "
                        "close sessions, wait for leases to end, or give the service more with session_bytes",
                        reason="SESSION_BYTES",
                        retry_after_s=1.0,
                    )
                self._reserved += size
            try:
                session.append(append, layers)
            finally:
                with self._lock:
                    self._reserved -= size

    def close(self, tenant: str, session_id: str) -> None:
        """Forget a session; unknown ones are ignored."""
        with self._lock:
            session = self._open.get(session_id)
            if session is not None and session.tenant == tenant:
                del self._open[session_id]

    def close_memory(self, memory_key: str) -> None:
        """Forget every session of a deleted memory."""
        with self._lock:
            self._open = {key: one for key, one in self._open.items() if one.memory_key != memory_key}

    def count(self, tenant: str, memory_key: str | None) -> tuple[int, int]:
        """Open sessions and their bytes of a tenant (and memory)."""
        with self._lock:
            self._expire()
            mine = [s for s in self._open.values() if s.tenant == tenant and memory_key in (None, s.memory_key)]
            return len(mine), sum(session.nbytes for session in mine)

    def expire(self) -> None:
        """Forget sessions whose lease ran out."""
        with self._lock:
            self._expire()

    def _used(self) -> int:
        return sum(session.nbytes for session in self._open.values())

    def _expire(self) -> None:
        now = time.time()
        for key in [key for key, session in self._open.items() if session.expires_at < now]:
            del self._open[key]
