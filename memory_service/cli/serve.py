"""`fot serve`: the service, until SIGTERM; and `fot settings`, which shows what it would run with."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from memory_service.cli.console import Json, print_json, print_table
from memory_service.cli.environment import variable
from memory_service.errors import Cancelled, FotError, Internal, InvalidArgument
from memory_service.process.allocator import keep_freed_memory
from memory_service.process.lifetime import run
from memory_service.process.logs import configure, event
from memory_service.settings import ServerSettings, StoreOptions

if TYPE_CHECKING:
    from memory_service.server.server import Server
    from memory_service.store.store import Store

IN_MEMORY = ":memory:"
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def serve(
    directory: Annotated[
        str | None, typer.Argument(help="Where everything durable is kept, made if missing; or :memory:.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port (port 0: any free) or unix:/path; several with commas.")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="The file that fot token keeps.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM certificate chain.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the certificate.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="PEM authority that clients' certificates need.")] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Serve other machines without TLS or tokens.")
    ] = None,
    metrics: Annotated[str | None, typer.Option(help="host:port of the Prometheus page /metrics.")] = None,
    health: Annotated[
        str | None, typer.Option(help="host:port of gRPC health alone, without TLS, for a kubelet's probes.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where attention runs: cpu, cuda, cuda:1, …")] = None,
    resident: Annotated[str | None, typer.Option(help="RAM for hot keys and values, as in 8GiB.")] = None,
    sessions: Annotated[str | None, typer.Option(help="RAM for all sessions, as in 8GiB.")] = None,
    snapshots: Annotated[
        Path | None, typer.Option(help="Where snapshots are kept; by default in the directory.")
    ] = None,
    begin_from_snapshots: Annotated[
        bool | None, typer.Option("--begin-from-snapshots", help="Fill a new directory from the newest snapshots.")
    ] = None,
    begin_from_shard: Annotated[
        str | None, typer.Option(help="Whose, if there are snapshots of several shards.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json.")] = None,
) -> None:
    """Serve a directory until SIGTERM or Ctrl-C, then let calls under way finish.

    Every setting is also read from the environment; fot settings lists them.
    """
    # They load torch: fot --help does not wait for it.
    from memory_service.server.server import serve as serve_until_stopped
    from memory_service.store.store import Store

    settings = _settings(
        data=None if directory is None else Path(directory),
        listen=listen,
        tokens=tokens,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        tls_client_ca=tls_client_ca,
        insecure=insecure,
        metrics=metrics,
        health=health,
        log_level=log_level,
        log_format=log_format,
        store=_given(
            device=device,
            resident_bytes=_bytes(resident),
            session_bytes=_bytes(sessions),
            snapshots=snapshots,
            begin_from_snapshots=begin_from_snapshots,
            begin_from_shard=begin_from_shard,
        ),
    )
    if settings.data is None:
        raise typer.BadParameter(f"say where to keep the data, as in fot serve ./data; {IN_MEMORY} forgets it")
    configure(settings.log_level, settings.log_format)
    _allow_many_files()
    data = None if str(settings.data) == IN_MEMORY else settings.data

    def announce(server: Server) -> None:
        where = ", ".join(_target(address, tls=settings.tls_certificate is not None) for address in server.addresses)
        sys.stdout.write(f"fot serves {settings.data} at {where}\n")
        sys.stdout.flush()
        if store.beginning:
            threading.Thread(target=_begin, args=(store, failed), name="fot-begin", daemon=True).start()

    failed: list[FotError] = []
    with Store.open(data, settings.store, begin=False) as store:
        keep_freed_memory()
        run(serve_until_stopped(store, settings, announce))
    if failed:
        raise failed[0]


def _begin(store: Store, failed: list[FotError]) -> None:
    """Fill the store while it already says that it is not ready; what cannot be filled must not be served."""
    try:
        store.begin()
    except Cancelled:
        return
    except FotError as error:
        failed.append(error)
    except Exception as error:
        event(logging.ERROR, "the store could not be filled from snapshots", error)
        failed.append(Internal("the store could not be filled from snapshots; the log has the details"))
    if failed:
        os.kill(os.getpid(), signal.SIGTERM)


def settings(json: Json = False) -> None:
    """List all settings of the service: what they are now, by default, and where they are read from."""
    now, usual = _plain(_settings()), _plain(ServerSettings.model_construct())
    if json:
        print_json({variable(name): value for name, value in now.items()})
        return
    rows = [
        (variable(name), _told(value), "" if value == usual[name] else _told(usual[name]))
        for name, value in now.items()
    ]
    print_table("", ("variable", "value", "by default"), rows, "")


def _settings(**given: Any) -> ServerSettings:
    """What the command line gives, else the environment, else the default. Raises InvalidArgument."""
    try:
        return ServerSettings(**_given(**given))
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"])) or "settings"
        raise InvalidArgument(f"{variable(name)} cannot be {wrong['input']!r}: {wrong['msg'].lower()}") from None


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value != {}}


def _plain(found: ServerSettings) -> dict[str, Any]:
    """Settings by dotted name."""
    own = {name: getattr(found, name) for name in ServerSettings.model_fields if name != "store"}
    return own | {f"store.{field.name}": getattr(found.store, field.name) for field in fields(StoreOptions)}


def _told(value: object) -> str:
    return "" if value is None else str(value)


def _bytes(text: str | None) -> int | None:
    """Bytes of 8GiB, 512m or 1000."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise typer.BadParameter(f"a size is a number and KiB, MiB, GiB or TiB, as in 8GiB; got {text!r}")
    return int(match[1]) * _UNITS[match[2]]


def _target(address: str, *, tls: bool) -> str:
    if address.startswith("unix:"):
        return address
    return f"{'grpcs' if tls else 'grpc'}://{address}"


def _allow_many_files() -> None:
    """Take as many open files as the system allows: every segment that is read keeps one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 16), hard)
        )
