"""What the service counts and times, for Prometheus. Labels are bounded: never a tenant, memory or document."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The figures of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "fot_rpc_duration_seconds",
            "Time of a call in the service, from its arrival to its answer.",
            ("method", "code"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._rejected = Counter(
            "fot_admission_rejected_total",
            "Calls turned away because the service was full.",
            ("pool", "limit"),
            registry=self.registry,
        )
        self._upload_bytes = Counter(
            "fot_upload_bytes_total", "Bytes of document chunks written.", registry=self.registry
        )
        self._gauges = {
            "calls": Gauge("fot_pool_calls", "Calls admitted and not answered.", ("pool",), registry=self.registry),
            "bytes": Gauge("fot_pool_bytes", "Bytes they may hold.", ("pool",), registry=self.registry),
        }
        self._ready = Gauge("fot_ready", "1 while the store answers.", registry=self.registry)
        self._writable = Gauge("fot_writable", "0 once a disk error made it read-only.", registry=self.registry)
        self._behind = Gauge("fot_behind", "1 while this replica may lack writes: fot heal.", registry=self.registry)
        ProcessCollector(registry=self.registry)
        self.observe_call = cache(self._observer)

    def _observer(self, method: str, code: str) -> Callable[[float], None]:
        """Takes the seconds of one call; kept by method and code, as finding the series costs more than counting."""
        return self._calls.labels(method, code).observe

    def rejected(self, pool: str, limit: str) -> None:
        """A call was turned away."""
        self._rejected.labels(pool, limit).inc()

    def uploaded(self, count: int) -> None:
        """Chunk bytes were written."""
        self._upload_bytes.inc(count)

    def watch_pool(self, pool: str, calls: Callable[[], float], held: Callable[[], float]) -> None:
        """Ask these whenever the page is read."""
        self._gauges["calls"].labels(pool).set_function(calls)
        self._gauges["bytes"].labels(pool).set_function(held)

    def watch_store(
        self,
        ready: Callable[[], bool],
        writable: Callable[[], bool],
        behind: Callable[[], bool],
        directory: Path | None,
    ) -> None:
        """Ask these whenever the page is read. Of a directory, also the room on its disk."""
        self._ready.set_function(ready)
        self._writable.set_function(writable)
        self._behind.set_function(behind)
        if directory is not None and directory.is_dir():
            self._watch_disk(directory)

    def _watch_disk(self, directory: Path) -> None:
        free = Gauge("fot_disk_free_bytes", "Room left on the disk of the data.", registry=self.registry)
        free.set_function(lambda: shutil.disk_usage(directory).free)
        size = Gauge("fot_disk_bytes", "Size of the disk of the data.", registry=self.registry)
        size.set_function(lambda: shutil.disk_usage(directory).total)


@contextmanager
def page(metrics: Metrics, host: str, port: int) -> Iterator[int]:
    """Serve /metrics while the block runs; gives the port."""
    server, thread = start_http_server(port, host, metrics.registry)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
