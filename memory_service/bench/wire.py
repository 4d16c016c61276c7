"""`fot bench wire`: bytes on the wire per generated token, pushing the query down against shipping keys and values.

The geometry is LongLLaMA-3B's: 3 memory layers of 32 heads of 100 dimensions, one token, top 128. Counted are the
serialized protobuf messages themselves, request and response; HTTP/2 framing adds a few dozen bytes a call.

    pushdown    AttendRequest and AttendResponse of each memory layer; queries and output in bf16, as the model's
    float32     the same with queries and output in float32
    ship        the keys and values of each head's own top 128 in bf16; the search that finds them is not counted
"""

from __future__ import annotations

from typing import Any

import torch

from memory_service.bench.harness import Progress, Result, say, show
from memory_service.types.answers import Attended, Coverage
from memory_service.types.questions import AttendGroup, AttendOptions, Engine
from memory_service.types.scopes import Scope
from memory_service.types.specs import DType
from memory_service.verbs import Attend
from memory_service.wire.codec import RPCS
from memory_service.wire.tensors import write_tensor

LAYERS = (6, 12, 18)
HEADS, DIM, TOP_K = 32, 100, 128
IN_SCOPE = 262_144


def run(*, quick: bool = False, progress: Progress = say) -> Result:
    """Count; takes no time. `quick` changes nothing and is here for the three benchmarks to be called alike."""
    progress(f"{len(LAYERS)} layers × {HEADS} heads × {DIM}, one token, top {TOP_K}")
    rows = [_pushdown("pushdown", DType.BF16), _pushdown("float32", DType.F32), _ship()]
    pushdown, _, ship = (float(row["bytes"]) for row in rows)
    figures = {
        "pushdown_bytes_per_token": pushdown,
        "ship_bytes_per_token": ship,
        "ratio": round(ship / pushdown, 1),
    }
    settings = {"layers": list(LAYERS), "heads": HEADS, "head_dim": DIM, "top_k": TOP_K, "tokens": 1, "quick": quick}
    return Result("wire", figures, rows, settings)


def render(result: Result) -> None:
    """Print the bytes and the figures."""
    lines = [(r["contender"], r["request_bytes"], r["response_bytes"], r["bytes"]) for r in result.rows]
    show("wire, bytes a token", ("contender", "requests", "responses", "together"), lines, result.figures)


def _pushdown(name: str, dtype: DType) -> dict[str, Any]:
    """Attend of every memory layer over one session, as a worker calls it for one token."""
    generator = torch.Generator().manual_seed(0)
    rpc = RPCS[Attend]
    requests = responses = 0
    for layer in LAYERS:
        queries = torch.randn(HEADS, 1, DIM, generator=generator).to(dtype.torch)
        options = AttendOptions(top_k=TOP_K, engine=Engine.EXACT, output_dtype=dtype)
        group = AttendGroup(Scope.session("0" * 32), queries)
        requests += rpc.to_request(Attend("default", layer, (group,), options)).ByteSize()
        output = torch.randn(HEADS, 1, DIM, generator=generator).to(dtype.torch)
        answer = Attended(output, torch.randn(HEADS, 1, generator=generator), Coverage(IN_SCOPE, IN_SCOPE), "exact")
        responses += rpc.to_response((answer,)).ByteSize()
    return _row(name, requests, responses)


def _ship() -> dict[str, Any]:
    """The keys and values themselves, as two tensors a layer; what asks for them is not counted."""
    piece = write_tensor(torch.zeros(HEADS, TOP_K, DIM, dtype=torch.bfloat16))
    return _row("ship", 0, len(LAYERS) * 2 * piece.ByteSize())


def _row(name: str, requests: int, responses: int) -> dict[str, Any]:
    return {
        "contender": name,
        "request_bytes": requests,
        "response_bytes": responses,
        "bytes": requests + responses,
    }
