"""`fot token`: make, list and revoke the tokens that a service accepts."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from memory_service.cli.console import Json, print_json, print_table, say, when
from memory_service.errors import NotFound
from memory_service.server.auth import Token, TokenFile
from memory_service.types.callers import Role

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the tokens that a service accepts.")

File = Annotated[Path, typer.Option("--tokens", envvar="FOT_TOKENS", help="The service's token file.")]
Name = Annotated[str, typer.Argument(help="A name for people, unique in the file.")]
_SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command("create")
def create(
    name: Name,
    tokens: File,
    tenant: Annotated[str, typer.Option(help="Whose memories it opens.")] = "default",
    role: Annotated[
        Role, typer.Option(help="read attends, write also stores, admin also creates memories.")
    ] = Role.READ,
    expires: Annotated[str | None, typer.Option(help="It ends after 12h, 30d, 8w, …; never without.")] = None,
    json: Json = False,
) -> None:
    """Make a token and print it, this once: the file keeps only its digest."""
    expires_at = None if expires is None else time.time() + _duration_s(expires)
    token = TokenFile(tokens).create(name, tenant, role, expires_at)
    if json:
        print_json({"name": name, "tenant": tenant, "role": role, "expires_at": expires_at, "token": token})
        return
    # The token alone on standard output, so that a script can take it.
    sys.stdout.write(token + "\n")
    sys.stderr.write(f"Token {name} may {role} memories of tenant {tenant}. Keep it: it is not shown again.\n")


@app.command("ls")
def list_(tokens: File, json: Json = False) -> None:
    """List the tokens by name; never the tokens themselves."""
    found = _existing(tokens).tokens()
    if json:
        print_json([_public(token) for token in found])
        return
    rows = [(t.name, t.tenant, t.role, when(t.created_at), _end(t)) for t in found]
    print_table("", ("token", "tenant", "role", "created", "expires"), rows, "No tokens yet: fot token create.")


@app.command("revoke")
def revoke(name: Name, tokens: File) -> None:
    """Forget a token; services that read the file refuse it at once."""
    _existing(tokens).revoke(name)
    say(f"Revoked token {name}.")


def _existing(path: Path) -> TokenFile:
    if not path.is_file():
        raise NotFound(f"there is no token file {path}; fot token create makes one")
    return TokenFile(path)


def _duration_s(text: str) -> float:
    match = re.fullmatch(r"(\d+)([mhdw])", text)
    if match is None:
        raise typer.BadParameter(f"--expires takes a number and m, h, d or w, as in 30d; got {text!r}")
    return int(match[1]) * _SECONDS[match[2]]


def _end(token: Token) -> str:
    if token.expires_at is None:
        return "never"
    return f"{when(token.expires_at)}{' (expired)' if token.expired else ''}"


def _public(token: Token) -> dict[str, object]:
    return {
        "name": token.name,
        "tenant": token.tenant,
        "role": token.role,
        "created_at": token.created_at,
        "expires_at": token.expires_at,
        "expired": token.expired,
    }
