"""The same engine on a GPU gives the same answers. Runs only where there is one (`make test-gpu`)."""

from __future__ import annotations

import pytest
import torch

from memory_service import verbs
from memory_service.attention import exact
from memory_service.settings import StoreOptions
from memory_service.store.store import Store
from memory_service.types.callers import Identity, Role
from memory_service.types.documents import Document
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType, Fingerprint, MemorySpec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ME = Identity("default", Role.ADMIN)
MODEL = Fingerprint("model")


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("top_k", [0, 32])
def test_attention_on_the_gpu_equals_float32_attention(dtype: DType, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 20_000, 64, generator=generator).to(dtype.torch) for _ in range(2))
    queries = torch.randn(4, 9, 64, generator=generator)
    with Store.open(None, StoreOptions(device="cuda", background=False)) as store:
        store.run(ME, verbs.CreateMemory("m", MemorySpec(MODEL, (0,), 2, 64, dtype)))
        store.run(ME, verbs.PutDocument("m", Document("d", keys, values), MODEL))
        options = AttendOptions(top_k=top_k, engine=Engine.EXACT)
        (answer,) = store.run(ME, verbs.Attend("m", 0, (AttendGroup(Scope(), queries),), options))
    wide = keys[0].repeat_interleave(2, 0), values[0].repeat_interleave(2, 0)
    visible = None
    if top_k:
        scores = queries @ wide[0].float().mT
        visible = torch.zeros_like(scores, dtype=torch.bool).scatter(2, scores.topk(top_k, 2).indices, True)
    expected = exact.attend(queries * 64**-0.5, *wide, visible)
    torch.testing.assert_close(answer.output, expected.output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answer.lse, expected.lse, atol=1e-5, rtol=1e-5)
