"""A process that writes, deletes and compacts is killed at any moment: what it acknowledged is there, whole."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_service import verbs
from memory_service.settings import StoreOptions
from memory_service.store.store import Store
from memory_service.types.operations import OperationKind, OperationState
from tests.memory_service.oracle import ME, attend, error, finish, reference
from tests.memory_service.victims import made

ROOT = Path(__file__).parents[2]
QUERIES = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


class Nursery:
    """Gives birth to victims and hears what they say."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._rest = b""

    def order(self, directory: Path, seed: int, have: dict[str, int | None], version: int) -> int:
        """A new victim's process id."""
        assert self._process.stdin
        order = {"directory": str(directory), "seed": seed, "have": have, "version": version}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return int(self.hear(60)[1])

    def hear(self, timeout_s: float) -> list[Any]:
        """The next line, or [] if none comes in time."""
        assert self._process.stdout
        end = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, *_ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                return []
            new = os.read(self._process.stdout.fileno(), 1 << 16)
            assert new, "the nursery is gone"
            self._rest += new
        line, _, self._rest = self._rest.partition(b"\n")
        words: list[Any] = json.loads(line)
        return words


@contextmanager
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, "-m", "tests.memory_service.victims"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            yield Nursery(process)
            assert process.stdin
            process.stdin.close()
            process.wait(30)
        finally:
            if process.poll() is None:  # A victim may be left: it writes until it is killed.
                os.killpg(process.pid, signal.SIGKILL)


class Witness:
    """What must be there: kept outside the process that is killed."""

    def __init__(self) -> None:
        self.sure: dict[str, int | None] = {}
        self.open: dict[str, int | None] = {}  # Announced, not confirmed: may have happened or not.
        self.confirmed = self.compactions = 0
        self.version = 0

    def hear(self, words: list[Any]) -> None:
        match words:
            case ["try", name, version]:
                self.open[name] = version
                self.version = max(self.version, version or 0)
            case ["done", name]:
                self.sure[name] = self.open.pop(name)
                self.confirmed += 1
            case ["compacted", state, message]:
                assert state == "done", message
                self.compactions += 1
            case ["failed", problem]:
                raise AssertionError(f"the victim failed by itself: {problem}")
            case _:
                assert words[0] == "ready", words

    def check(self, store: Store, note: str) -> None:
        """Every confirmed change is there, every other one wholly or not at all, and nothing else."""
        found: dict[str, int | None] = {}
        keys, values = [], []
        page = store.run(ME, verbs.ListDocuments("m", page_size=1000))
        assert not page.next
        for info in page.items:
            version = int(info.metadata["version"])
            found[info.id] = version
            one = made(info.id, version)
            assert one.tokens == info.tokens, (note, info)
            for layer, place in ((3, 0), (7, 1)):
                got = store.run(ME, verbs.Fetch("m", info.id, layer, 0, info.tokens))
                assert torch.equal(got.keys, one.keys[place]), (note, info)
                assert torch.equal(got.values, one.values[place]), (note, info)
                assert torch.equal(got.token_ids, one.token_ids), (note, info)  # type: ignore[arg-type]
            keys.append(one.keys[0])
            values.append(one.values[0])
        for name in {*self.sure, *self.open, *found}:
            allowed = [self.sure.get(name)] + ([self.open[name]] if name in self.open else [])
            assert found.get(name) in allowed, f"{note}: {name} is {found.get(name)}, which is none of {allowed}"
        if keys:
            expected = reference(QUERIES, torch.cat(keys, 1), torch.cat(values, 1))
            assert error(attend(store, "m", 3, QUERIES), expected) <= 1e-5, note
        self.sure, self.open = found, {}


def kill_and_look(directory: Path, kills: int, seed: int, compactions: int = 0) -> Witness:
    """Kill victims one after the other on the same directory, looking at it after each.

    On a busy machine up to four times as many, which live longer, until so many compactions were confirmed.
    """
    witness = Witness()
    dice = random.Random(seed)
    with nursery() as cradle:
        for turn in range(4 * kills):
            if turn >= kills and witness.compactions >= compactions:
                break
            note = f"seed {seed}, kill {turn}"
            pid = cradle.order(directory, seed + turn, witness.sure, witness.version)
            while (words := cradle.hear(60)) != ["ready"]:
                witness.hear(words)
            end = time.monotonic() + dice.uniform(0.0, 0.4) * (1 + 3 * (turn // kills))
            while time.monotonic() < end:
                if words := cradle.hear(end - time.monotonic()):
                    witness.hear(words)
            os.kill(pid, signal.SIGKILL)
            while (words := cradle.hear(60))[:2] != ["dead", pid]:
                witness.hear(words)
            assert words[2] == signal.SIGKILL, f"{note}: the victim died of something else"
            with Store.open(directory, StoreOptions(background=False)) as store:
                witness.check(store, note)
                if turn % 5 == 0:
                    check_files(store, directory, note)
    return witness


def check_files(store: Store, directory: Path, note: str) -> None:
    """No file is left that nobody knows, and every byte of the others is sound."""
    known = {ref.path for ref in store._memories.get("default", "m").segments.values()}
    assert {path.name for path in directory.rglob("*.safetensors")} == known, note
    assert not list((directory / "staging").iterdir()), note
    done = finish(store, "m", OperationKind.VERIFY)
    assert done.state is OperationState.DONE, (note, done.message)


def test_25_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    witness = kill_and_look(tmp_path / "data", 25, seed=1, compactions=3)
    # A slow disk confirms few; none at all would prove nothing.
    assert witness.confirmed >= 25
    assert witness.compactions >= 3


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_many_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    kills = int(os.environ.get("FOT_SOAK_KILLS", "1000"))
    seed = int(os.environ.get("FOT_SOAK_SEED", str(time.time_ns() % 1_000_000)))
    print(f"seed {seed}")
    # A directory for every 100 kills: with age, documents and old segments would make each look slow.
    total = [
        kill_and_look(tmp_path / str(first), min(100, kills - first), seed + first) for first in range(0, kills, 100)
    ]
    confirmed, compactions = (sum(getattr(one, name) for one in total) for name in ("confirmed", "compactions"))
    print(f"{kills} kills, {confirmed} acknowledged changes, {compactions} compactions, 0 lost")
