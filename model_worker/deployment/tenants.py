"""An overseer's connections to services: with one token for each tenant whose memories it keeps whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from memory_service.cluster.place import IMPATIENT, Lines
from memory_service.errors import InvalidArgument
from memory_service.places.remote import RemotePlace
from memory_service.places.targets import Address, Tls
from model_worker.deployment.plan import Security

_LINE = replace(IMPATIENT, patience_s=1.5)  # A process that does not answer may just be coming back.


class Tenants:
    """Not for several threads at once, but for `place`."""

    def __init__(self, security: Security):
        """The tokens are read by `read`: a file that is missing is the next round's problem, not the actor's end."""
        self._security = security
        self._secrets: tuple[str, ...] = ("",)
        self.lines = self._open()

    def read(self) -> None:
        """Take up the tokens; connections are made anew when a file has changed. Raises InvalidArgument."""
        secrets = tuple(_secret(file) for file in self._security.token_files) or ("",)
        if secrets != self._secrets:
            before, self._secrets = self.lines, secrets
            self.lines = self._open()
            for one in before:
                one.close()

    def place(self, authority: str) -> RemotePlace:
        """The service at an address, as the first tenant's admin sees it."""
        return self.lines[0].place(authority)

    def close(self) -> None:
        """Close the connections."""
        for one in self.lines:
            one.close()

    def _open(self) -> tuple[Lines, ...]:
        security, tls = self._security, None
        if security.tls_certificate is not None:
            mutual = security.tls_client_ca is not None
            tls = Tls(
                ca=_path(security.ca),
                certificate=_path(security.tls_certificate) if mutual else None,
                key=_path(security.tls_key) if mutual else None,
            )

        def lines_of(secret: str) -> Lines:
            return Lines(lambda authority: Address(authority, authority, tls, secret or None), _LINE)

        return tuple(lines_of(secret) for secret in self._secrets)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _secret(file: str) -> str:
    try:
        return Path(file).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidArgument(f"the token file {file} cannot be read on the head node: {error.strerror}") from None
