"""TLS: who is not vouched for does not get in, and a new certificate needs no restart (T11)."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from memory_service.errors import InvalidArgument
from memory_service.server.auth import TokenFile
from memory_service.server.server import running
from memory_service.settings import ServerSettings
from memory_service.types.answers import Attended, Coverage
from memory_service.types.callers import Role
from tests.memory_service.calls import Caller, SpyStore, attend, calling, outcome

EMPTY = (Attended(torch.zeros(1, 1, 4), torch.zeros(1, 1), Coverage(0, 0), "dense"),)
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority of this test's own."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._signed(self._name, self._key, NOW + DAY, authority=True)
        self.pem = certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, host: str, ends: datetime.datetime = NOW + DAY) -> tuple[bytes, bytes]:
        """Certificate and key, in PEM, of a host name or address."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        certificate = self._signed(name, key, ends, host=host)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return certificate.public_bytes(serialization.Encoding.PEM), private

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        ends: datetime.datetime,
        host: str = "",
        authority: bool = False,
    ) -> x509.Certificate:
        building = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - 2 * DAY)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if host:
            is_address = host.replace(".", "").isdecimal()
            known_as = x509.IPAddress(ipaddress.ip_address(host)) if is_address else x509.DNSName(host)
            building = building.add_extension(x509.SubjectAlternativeName([known_as]), critical=False)
        return building.sign(self._key, hashes.SHA256())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("ours")


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> dict[str, Path]:
    """Certificate and key of 127.0.0.1, as settings."""
    return _written(tmp_path, authority.issue("127.0.0.1"))


def _written(directory: Path, issued: tuple[bytes, bytes]) -> dict[str, Path]:
    (directory / "certificate.pem").write_bytes(issued[0])
    (directory / "key.pem").write_bytes(issued[1])
    return {"tls_certificate": directory / "certificate.pem", "tls_key": directory / "key.pem"}


@contextmanager
def serving(**given: Any) -> Iterator[str]:
    settings = ServerSettings(**{"listen": "127.0.0.1:0", "drain_grace_s": 1.0} | given)
    with running(SpyStore(lambda verb, cancel: EMPTY), settings) as address:
        yield address


def asked(caller: Caller) -> str:
    return outcome(lambda: caller.ask(attend(), timeout_s=5))


def trusting(authority: Authority, issued: tuple[bytes, bytes] | None = None) -> dict[str, Any]:
    certificate, key = issued or (None, None)
    return {"credentials": grpc.ssl_channel_credentials(authority.pem, key, certificate)}


def test_a_client_that_trusts_the_authority_gets_in(files: dict[str, Path], authority: Authority) -> None:
    with serving(**files) as address, calling(address, **trusting(authority)) as caller:
        assert asked(caller) == "OK"


def test_plaintext_to_a_tls_port_gets_nowhere(files: dict[str, Path]) -> None:
    with serving(**files) as address, calling(address) as caller:
        assert asked(caller) == "UNAVAILABLE"


@pytest.mark.parametrize("wrong", ["authority", "host", "expired"])
def test_a_client_does_not_believe_a_certificate_that_is_wrong(
    tmp_path: Path, authority: Authority, wrong: str
) -> None:
    signing = Authority("somebody else's") if wrong == "authority" else authority
    host = "elsewhere.example.com" if wrong == "host" else "127.0.0.1"
    issued = signing.issue(host, NOW - DAY if wrong == "expired" else NOW + DAY)
    with serving(**_written(tmp_path, issued)) as address, calling(address, **trusting(authority)) as caller:
        assert asked(caller) == "UNAVAILABLE"


def test_with_a_client_authority_a_client_must_be_vouched_for(
    tmp_path: Path, files: dict[str, Path], authority: Authority
) -> None:
    clients, strangers = Authority("clients"), Authority("strangers")
    (tmp_path / "clients.pem").write_bytes(clients.pem)
    with serving(**files, tls_client_ca=tmp_path / "clients.pem") as address:
        for issued, expected in (
            (clients.issue("worker"), "OK"),
            (strangers.issue("worker"), "UNAVAILABLE"),
            (None, "UNAVAILABLE"),
        ):
            with calling(address, **trusting(authority, issued)) as caller:
                assert asked(caller) == expected


def test_a_new_certificate_is_used_without_a_restart_and_no_call_is_lost(
    tmp_path: Path, files: dict[str, Path], authority: Authority
) -> None:
    renewed = Authority("renewed")
    with serving(**files) as address, calling(address, **trusting(authority)) as early:
        assert asked(early) == "OK"
        _written(tmp_path, renewed.issue("127.0.0.1"))
        assert asked(early) == "OK"
        with calling(address, **trusting(renewed)) as late:
            assert asked(late) == "OK"
        with calling(address, **trusting(authority)) as late:
            assert asked(late) == "UNAVAILABLE"
        files["tls_key"].unlink()  # Half a renewal: the last whole one stays.
        with calling(address, **trusting(renewed)) as late:
            assert asked(late) == "OK"


def test_tokens_are_asked_for_within_tls(tmp_path: Path, files: dict[str, Path], authority: Authority) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    token = tokens.create("ci", "acme", Role.READ)
    with serving(**files, tokens=tokens.path, listen="0.0.0.0:0") as address:
        local = address.replace("0.0.0.0", "127.0.0.1")
        for given, expected in ((token, "OK"), (None, "UNAUTHENTICATED")):
            with calling(local, given, **trusting(authority)) as caller:
                assert asked(caller) == expected


def test_half_a_tls_setup_does_not_start(tmp_path: Path, files: dict[str, Path]) -> None:
    for given, told in (
        ({"tls_certificate": files["tls_certificate"]}, "both"),
        ({"tls_client_ca": files["tls_key"]}, "needs TLS"),
        (files | {"tls_key": tmp_path / "missing.pem"}, "cannot be read"),
    ):
        with pytest.raises(InvalidArgument, match=told), serving(**given):
            pass
