"""A contender in a process of its own, so that its threads and its peak memory are its own.

The process reads one JSON object a line and answers with one. `model_worker.bench.process` is its main program.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from memory_service.errors import Unavailable
from memory_service.types.specs import DType
from model_worker.bench.geometry import Geometry
from model_worker.settings import FotConfig, Recall, SelfExtend

PLANTED_TOKENS = 65_536  # Of a document that holds planted keys and values.


@dataclass(frozen=True, slots=True)
class Setup:
    """One contender: what it is, of which size, where its memory lives."""

    kind: str  # "fot", "reference", or "base": the untouched model.
    geometry: Geometry
    layers: tuple[int, ...] = ()
    dtype: str = DType.F32
    target: str = ":memory:"  # Of a "fot".
    name: str = "bench"  # Of its memory.
    planted: str | None = None  # A file of keys and values [L, H, M, D] that the memory starts with.
    extend: tuple[int, int] | None = None  # Of a "fot" without memory layers: group and window of Self-Extend.
    longest: int = 0  # Of a "fot" without memory layers: tokens of its one window.
    threads: int = 1

    @property
    def fot(self) -> FotConfig:
        """How the model remembers; without memory layers, one window over everything."""
        if self.layers or not self.longest:
            return self.geometry.fot(self.layers, DType(self.dtype))
        return self.geometry.extended(self.longest, SelfExtend(*self.extend) if self.extend else None)


@dataclass(frozen=True, slots=True)
class Quality:
    """How well an index found what the model asked for."""

    recall: float  # Of the exact top k, mean over queries.
    mass: float  # Softmax mass of what was found over that of the exact top k.


@dataclass(frozen=True, slots=True)
class Mode:
    """How a "fot" asks its memory while decoding."""

    name: str
    top_k: int = 0
    engine: str = "auto"
    search: Mapping[str, float] = field(default_factory=dict)

    @property
    def recall(self) -> Recall:
        return Recall(top_k=self.top_k, engine=self.engine, search=dict(self.search))


DENSE = Mode("dense")


@dataclass(frozen=True, slots=True)
class Measured:
    """One timed command."""

    seconds: list[float]  # Of the prompt, or of each token.
    cpu_s: float  # Processor time of the whole process: more than the seconds if it used more than one core.
    rss_ready_mb: float  # Resident memory when the model was built and its memory planted.
    peak_rss_mb: float
    logits: list[float]  # [V] after the last token.

    @property
    def growth_mb(self) -> float:
        """Memory it needed on top of that."""
        return max(self.peak_rss_mb - self.rss_ready_mb, 0.0)


class Channel(Protocol):
    """Where commands go, one line each, and come back answered."""

    def obey(self, line: str) -> str: ...

    def close(self) -> None: ...


class Subject:
    """A handle on a contender and its process. Use `with`: it ends with the block."""

    def __init__(self, setup: Setup, channel: Channel):
        """Wait until its model is built and its memory planted. Raises Unavailable if that fails."""
        self._channel = channel
        try:
            self._ask("setup", asdict(setup))
        except BaseException:
            self.close()
            raise

    def prefill(self, tokens: int) -> Measured:
        """Read a prompt of so many tokens from nothing."""
        return Measured(**self._ask("prefill", {"tokens": tokens}))

    def start(self, tokens: int, mode: Mode) -> None:
        """Read a prompt that `decode` goes on from."""
        self._ask("start", {"tokens": tokens, "mode": asdict(mode)})

    def decode(self, tokens: int, mode: Mode) -> Measured:
        """Read so many more tokens, one at a time."""
        return Measured(**self._ask("decode", {"tokens": tokens, "mode": asdict(mode)}))

    def quality(self, tokens: int, mode: Mode) -> Quality:
        """How well the index answers the queries of so many tokens."""
        return Quality(**self._ask("quality", {"tokens": tokens, "mode": asdict(mode)}))

    def _ask(self, command: str, facts: Mapping[str, Any]) -> Any:
        answer = json.loads(self._channel.obey(json.dumps({"command": command, **facts})))
        if "error" in answer:
            raise Unavailable(f"what was to {command} failed: {answer['error']}")
        return answer["answer"]

    def close(self) -> None:
        """End it. Harmless twice."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
