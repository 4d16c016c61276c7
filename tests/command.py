"""`fot` run in the tests' own process: starting another takes seconds."""

from __future__ import annotations

import io
import json
import sys
from typing import Any, NamedTuple

import pytest

from memory_service.cli import main


class Done(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """What a reader sees, on one line."""
        return " ".join(self.out.split())


class Fot:
    """Runs a command and gives what came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object, stdin: str = "") -> Done:
        self._monkeypatch.setattr(sys, "argv", ["fot", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = self._capsys.readouterr()
        return Done(int(left.value.code or 0), out, err)
