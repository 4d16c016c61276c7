"""Who calls: tokens and the identities behind them. Page tokens, which bind a listing to who asked for it."""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from memory_service.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unauthenticated
from memory_service.types.callers import Identity, Role
from memory_service.types.names import check_name
from memory_service.verbs import ListDeleted, ListDocuments, ListMemories, ListOperations, ListSnapshots

PREFIX = "fot_"
EVERYONE = Identity("default", Role.ADMIN)  # Of a service without tokens, and of an embedded store.
_FORMAT = 1
Listing = TypeVar("Listing", bound=ListMemories | ListDocuments | ListDeleted | ListOperations | ListSnapshots)


@dataclass(frozen=True, slots=True)
class Token:
    """A token as the file keeps it: never the token itself."""

    name: str  # Unique; for people and for revoking.
    tenant: str
    role: Role
    sha256: str  # Hex digest of the token.
    created_at: float  # Seconds since the epoch, as `expires_at`.
    expires_at: float | None = None

    @property
    def expired(self) -> bool:
        return self.expires_at is not None and time.time() >= self.expires_at


class TokenFile:
    """The tokens a service accepts, in a JSON file that only its owner may read. Changes take effect at once.

    Several processes may share the file: it is replaced atomically, and changed under a lock.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._seen: _Version | None = None
        self._tokens: dict[str, Token] = {}
        self._page_key = b""

    def create(self, name: str, tenant: str, role: Role, expires_at: float | None = None) -> str:
        """A new token, shown this once; makes the file if there is none. Raises AlreadyExists for a taken name."""
        check_name(name, "a token's name")
        check_name(tenant, "a tenant")
        token = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
        with self._changing() as tokens:
            if any(one.name == name for one in tokens):
                raise AlreadyExists(f"there is a token named {name!r}; revoke it first or choose another name")
            tokens.append(Token(name, tenant, role, _digest(token), time.time(), expires_at))
        return token

    def tokens(self) -> tuple[Token, ...]:
        """All tokens by name, expired ones included."""
        return tuple(sorted(self._read().values(), key=lambda token: token.name))

    def revoke(self, name: str) -> None:
        """Forget a token. Raises NotFound."""
        with self._changing() as tokens:
            kept = [token for token in tokens if token.name != name]
            if len(kept) == len(tokens):
                raise NotFound(f"there is no token named {name!r}")
            tokens[:] = kept

    def identity(self, token: str) -> Identity:
        """Whose token this is. Raises Unauthenticated if it is unknown or expired. Costs a stat and a hash."""
        digest = _digest(token)
        found = self._read().get(digest)
        # The lookup's timing tells of digests, which nobody can choose; comparing again costs nothing.
        if found is None or not hmac.compare_digest(found.sha256, digest):
            raise Unauthenticated("the token is unknown or was revoked; ask for another")
        if found.expired:
            raise Unauthenticated("the token has expired; ask for another")
        return Identity(found.tenant, found.role)

    @property
    def page_key(self) -> bytes:
        """The secret of page tokens; kept in the file, so that a restart does not break listings."""
        self._read()
        return self._page_key

    def _read(self) -> dict[str, Token]:
        """The tokens by digest, read again if the file changed."""
        with self._lock:
            version = _version(self.path)
            if version != self._seen:
                self._tokens, self._page_key = _load(self.path)
                self._seen = version
            return self._tokens

    @contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The tokens as a list to change; written back when the block ends well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_name(self.path.name + ".lock")):
            found, page_key = _load(self.path) if self.path.exists() else ({}, secrets.token_bytes(32))
            tokens = list(found.values())
            yield tokens
            content = {"version": _FORMAT, "page_key": page_key.hex(), "tokens": [asdict(one) for one in tokens]}
            _replace(self.path, json.dumps(content, indent=2) + "\n")


class _Version(NamedTuple):
    inode: int
    size: int
    modified_ns: int


def _version(path: Path) -> _Version:
    try:
        status = path.stat()
    except OSError as error:
        raise Unauthenticated("the service cannot read its tokens; nobody is let in until it can") from error
    return _Version(status.st_ino, status.st_size, status.st_mtime_ns)


def _load(path: Path) -> tuple[dict[str, Token], bytes]:
    if stat.S_IMODE(path.stat().st_mode) & 0o022:
        raise FailedPrecondition(f"others may write to the token file {path}; chmod 600 it")
    try:
        content = json.loads(path.read_text())
        if content["version"] != _FORMAT:
            raise FailedPrecondition(f"the token file {path} is of version {content['version']}, this is {_FORMAT}")
        tokens = [Token(**one | {"role": Role(one["role"])}) for one in content["tokens"]]
        return {token.sha256: token for token in tokens}, bytes.fromhex(content["page_key"])
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(f"the token file {path} is damaged: {error}") from error


def _digest(token: str) -> str:
    # A token is 32 random bytes: a slow hash would add nothing.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _replace(path: Path, text: str) -> None:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- Page tokens ----------------------------------------------------------------------------------------------------


class PageTokens:
    """Seals the store's page tokens: opaque to the caller, and valid only for the tenant and listing they came from."""

    def __init__(self, key: bytes):
        self._key = key

    def seal(self, identity: Identity, verb: Listing, token: str) -> str:
        """What the caller gets for the store's `token`; empty stays empty."""
        if not token:
            return ""
        body = token.encode()
        return base64.urlsafe_b64encode(self._mark(identity, verb, body) + body).decode()

    def opened(self, identity: Identity, verb: Listing) -> Listing:
        """The verb with the store's own page token. Raises InvalidArgument for a token of another listing."""
        if not verb.page_token:
            return verb
        try:
            raw = base64.b64decode(verb.page_token, altchars=b"-_", validate=True)
            body = raw[_MARK_BYTES:]
            if hmac.compare_digest(raw[:_MARK_BYTES], self._mark(identity, verb, body)):
                return replace(verb, page_token=body.decode())
        except (binascii.Error, ValueError):
            pass
        raise InvalidArgument("this page token belongs to no page of this listing; start again without one")

    def _mark(self, identity: Identity, verb: Any, body: bytes) -> bytes:
        # The page size may change from page to page; everything else makes another listing.
        listing = repr((identity.tenant, replace(verb, page_size=0, page_token="")))
        return hmac.digest(self._key, listing.encode("utf-8", "surrogatepass") + b"\0" + body, "sha256")[:_MARK_BYTES]


_MARK_BYTES = 16
