"""How much is under way: what is let in, what is counted, and the page that tells."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memory_service.errors import Cancelled, FotError, Internal, ResourceExhausted, Unavailable

if TYPE_CHECKING:
    from model_worker.serving.load import Load
    from model_worker.serving.requests import Finished

DRAINING = "DRAINING"
OK = "OK"


@dataclass(slots=True)
class Call:
    """One call while it is under way."""

    outcome: str = OK  # As it is counted: a status, or the reason of an error.


class Traffic:
    """Calls of both transports together; used on one event loop."""

    def __init__(self, most_calls: int):
        self.draining = False
        self.calls = 0  # Under way.
        self._most_calls = most_calls
        self._ended: Counter[tuple[str, str]] = Counter()  # By method and outcome.
        self._seconds: defaultdict[str, float] = defaultdict(float)  # By method.
        self._tokens: Counter[str] = Counter()

    @contextmanager
    def call(self, method: str) -> Iterator[Call]:
        """A call under way. Raises Unavailable while draining and ResourceExhausted if there are too many."""
        if self.draining:
            self._ended[method, DRAINING] += 1
            raise Unavailable("the worker is stopping; try another, or this one again soon", reason=DRAINING)
        if self.calls >= self._most_calls:
            self._ended[method, ResourceExhausted.reason] += 1
            raise ResourceExhausted(f"the worker is full: {self.calls} calls are under way", retry_after_s=1.0)
        self.calls += 1
        started, call = time.perf_counter(), Call()
        try:
            yield call
        except FotError as error:
            call.outcome = error.code
            raise
        except asyncio.CancelledError:
            call.outcome = Cancelled.reason
            raise
        except Exception:
            call.outcome = Internal.reason
            raise
        finally:
            self.calls -= 1
            self._ended[method, call.outcome] += 1
            self._seconds[method] += time.perf_counter() - started

    def answered(self, finished: Finished) -> None:
        """Count an answer's tokens."""
        self._tokens["prompt"] += finished.prompt_tokens
        self._tokens["cached"] += finished.cached_tokens
        self._tokens["completion"] += finished.completion_tokens

    def page(self, load: Load) -> str:
        """The figures as Prometheus reads them. Labels are bounded: never a tenant, key, collection or document."""
        states = {"queued": load.queued, "reading": load.reading, "writing": load.writing}
        lines = ["# TYPE fot_worker_requests gauge"]
        lines += [f'fot_worker_requests{{state="{state}"}} {count}' for state, count in states.items()]
        lines += ["# TYPE fot_worker_calls gauge", f"fot_worker_calls {self.calls}"]
        lines += ["# TYPE fot_worker_calls_total counter"]
        lines += [
            f'fot_worker_calls_total{{method="{method}",outcome="{outcome}"}} {count}'
            for (method, outcome), count in sorted(self._ended.items())
        ]
        lines += ["# TYPE fot_worker_call_seconds_total counter"]
        lines += [
            f'fot_worker_call_seconds_total{{method="{method}"}} {seconds:.6f}'
            for method, seconds in sorted(self._seconds.items())
        ]
        lines += ["# TYPE fot_worker_tokens_total counter"]
        lines += [f'fot_worker_tokens_total{{kind="{kind}"}} {count}' for kind, count in sorted(self._tokens.items())]
        return "\n".join(lines) + "\n"
