"""The job that moves documents to more shards does so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory_service import Memory
from tests.memory_service.clusters import SPEC, services

MOVE = Path(__file__).parents[2] / "deploy/kubernetes/memory_growth/move.py"


@pytest.mark.slow
def test_documents_move_to_more_shards_and_none_is_lost() -> None:
    names = {f"document-{number}" for number in range(20)}
    keys = torch.ones(2, 2, 3, 8)
    with services(2) as (first, second):
        known = f"grpc://{first}?replicas=1"
        with Memory.open(known, "m", SPEC) as memory:
            for name in names:
                memory.put(name, keys, keys)
        subprocess.run([sys.executable, MOVE, known, "1", first, second], check=True, timeout=100)
        with Memory.open(known, "m", SPEC) as memory:
            assert {one.id for one in memory.documents()} == names
        alone = [Memory.open(f"grpc://{address}", "m") for address in (first, second)]
        held = [{one.id for one in memory.documents()} for memory in alone]
        for memory in alone:
            memory.close()
    assert held[0] | held[1] == names
    assert min(map(len, held)) > 2
