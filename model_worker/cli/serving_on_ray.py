"""`fot api --ray`: the same servers, with replicas on a Ray cluster behind them."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from model_worker.deployment.serving import Scale, deploy, remove

if TYPE_CHECKING:
    from model_worker.api.server import Addresses
    from model_worker.api.setup import Setup


def serve_on_ray(
    setup: Setup,
    addresses: Addresses,
    replicas: int,
    most_replicas: int | None,
    cpus: float,
    gpus: float,
    ray_address: str | None,
    announce: Callable[[str | None, str | None], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C, then let answers under way finish and take the applications down.

    `announce` is told where HTTP and gRPC are.
    """
    scale = Scale(replicas, most_replicas, cpus=cpus, gpus=gpus)
    # From here on, so that a signal while replicas start takes down what there is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        try:
            listening = deploy(setup, addresses, scale, ray_address)
            announce(addresses.http, listening)
            signal.pause()
        finally:
            remove()
