"""Who calls: API keys, the tenants they belong to, and the memory token that a tenant's calls carry."""

from __future__ import annotations

import logging
from pathlib import Path

from memory_service.errors import FailedPrecondition, FotError, PermissionDenied, Unauthenticated
from memory_service.process.logs import event
from memory_service.server.auth import EVERYONE, TokenFile
from memory_service.types.callers import Identity, Role


class Keys:
    """The API keys a worker accepts, in a file that `fot token` keeps; without one everybody is the one tenant.

    `memory_tokens` is a directory with a file for every tenant, named after it, which holds the tenant's token for the
    memory service: what a caller may see there is the memory service's to decide. Without it there is one tenant,
    "default", with the worker's own token. Raises FailedPrecondition for a key file that is damaged or missing.
    """

    def __init__(self, file: Path | None = None, memory_tokens: Path | None = None):
        self._file = None if file is None else TokenFile(file)
        self._memory_tokens = memory_tokens
        if file is not None and not file.is_file():
            raise FailedPrecondition(f"there is no key file {file}; make keys with `fot token create --tokens {file}`")
        if self._file is not None:
            self._file.tokens()
        if memory_tokens is not None and not memory_tokens.is_dir():
            raise FailedPrecondition(f"{memory_tokens} is no directory; it should hold a memory token for every tenant")

    @property
    def asked(self) -> bool:
        """Whether a caller needs a key."""
        return self._file is not None

    def identity(self, authorization: str) -> Identity:
        """Whose key an authorization header carries. Raises Unauthenticated. Costs a stat and a hash."""
        if self._file is None:
            return EVERYONE
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("this needs an API key: send 'authorization: Bearer <key>'")
        try:
            return self._file.identity(key.strip())
        except Unauthenticated as error:
            raise Unauthenticated(error.message.replace("token", "API key")) from None
        except (FotError, OSError) as error:
            event(logging.ERROR, "the key file cannot be read", error)
            raise Unauthenticated("the worker cannot read its API keys; nobody is let in until it can") from None

    def memory_token(self, tenant: str) -> Path | None:
        """The file of a tenant's memory token; None: the worker's own. Raises PermissionDenied if it has none."""
        if self._memory_tokens is not None:
            # A tenant's name has neither slashes nor a leading dot.
            path = self._memory_tokens / tenant
            if path.is_file():
                return path
        elif tenant == EVERYONE.tenant:
            return None
        raise PermissionDenied("the tenant of this key has no memory here; the operator has to give it a memory token")


def check_role(identity: Identity, needed: Role) -> None:
    """Raise PermissionDenied for a key whose role is too low."""
    if identity.role.rank < needed.rank:
        raise PermissionDenied(f"this needs an API key with the role {needed}, yours has {identity.role}")
