"""Processes to be killed: they write to a store and say, on a pipe the killer holds, what they try and what is done.

A nursery imports everything once and forks a victim for every order it gets, so that a kill costs no start-up. Lines
on its standard output are JSON lists: ["born", pid], what victims say, ["dead", pid, signal].
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from memory_service import verbs
from memory_service.settings import StoreOptions
from memory_service.store.store import Store
from memory_service.types.documents import Document
from memory_service.types.operations import OperationKind
from memory_service.types.specs import MemorySpec
from tests.memory_service.oracle import ME, document, everything_in_small_pieces, finish, put, spec_of

SPEC = spec_of(dim=8)
WRITERS = 2
NAMES = 12  # Of each writer.
Versions = Mapping[str, int | None]  # What a document holds; None: there is none.


def made(name: str, version: int, spec: MemorySpec = SPEC) -> Document:
    """The document of this name and version, whole."""
    tokens = 1 + random.Random(f"{name}/{version}").randrange(220)
    return document(name, tokens, spec, f"{name}/{version}", {"version": version})


def say(*words: object) -> None:
    # One write, shorter than a pipe's atomic length: lines of several threads do not mix, and none is cut by a kill.
    os.write(1, json.dumps(words).encode() + b"\n")


def victim(directory: Path, seed: int, have: Versions, version: int) -> None:
    """Write until killed. Every change is announced before and confirmed after."""
    with everything_in_small_pieces(SPEC.bytes_per_token):
        store = Store.open(directory, StoreOptions(background=True, resident_bytes=300 * SPEC.bytes_per_token))
        store.run(ME, verbs.CreateMemory("m", SPEC))
        say("ready")
        threads = [
            threading.Thread(
                target=_guarded, args=(_write, store, random.Random(f"{seed}/{n}"), n, dict(have), version)
            )
            for n in range(WRITERS)
        ]
        threads.append(threading.Thread(target=_guarded, args=(_compact, store, random.Random(f"{seed}/c"))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _guarded(work: Callable[..., None], *arguments: object) -> None:
    try:
        work(*arguments)
    except BaseException as problem:
        say("failed", repr(problem)[:2000])
        os._exit(1)


def _write(store: Store, dice: random.Random, writer: int, have: dict[str, int | None], version: int) -> None:
    while True:
        name = f"{writer}-{dice.randrange(NAMES)}"
        version += 1
        if have.get(name) is not None and dice.random() < 0.4:
            say("try", name, None)
            store.run(ME, verbs.DeleteDocument("m", name))
            have[name] = None
        else:
            say("try", name, version)
            put(store, "m", made(name, version), replacing=True, request_id=f"{name}/{version}")
            have[name] = version
        say("done", name)


def _compact(store: Store, dice: random.Random) -> None:
    while True:
        time.sleep(dice.random() * 0.2)
        operation = finish(store, "m", OperationKind.COMPACT)
        say("compacted", operation.state.value, operation.message)


def nursery() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            try:
                victim(Path(order["directory"]), order["seed"], order["have"], order["version"])
            finally:
                os._exit(2)
        say("born", pid)
        _, status = os.waitpid(pid, 0)
        say("dead", pid, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)


if __name__ == "__main__":
    nursery()
