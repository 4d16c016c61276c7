"""The API on Ray Serve: replicas with a model each, HTTP by Serve's proxies, gRPC by a gateway of ours.

Serve's own gRPC proxy is not used: it listens on all interfaces without TLS, answers strangers' ListApplications, and
drops the details of errors. The gateway is the server of `fot api` with replicas behind it instead of a model.

    applications:
      - {name: fot, route_prefix: /, import_path: "model_worker.deployment.serving:build", args: {model: …, target: …}}
      - {name: fot-grpc, route_prefix: null, import_path: "model_worker.deployment.serving:build_grpc", args: …}
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig

from memory_service.errors import FotError, InvalidArgument
from memory_service.server.server import split_address
from memory_service.types.callers import Identity
from model_worker import reference
from model_worker.api.http import http_app
from model_worker.api.rpcs import Rpcs
from model_worker.api.server import Addresses
from model_worker.api.setup import Setup
from model_worker.api.traffic import Traffic
from model_worker.deployment.connection import connect
from model_worker.deployment.forwarding import answer_here
from model_worker.deployment.gateway import APPLICATION, REPLICA, Gateway

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.types import ASGIApp

Told = TypeVar("Told")

GATEWAY = "fot-grpc"
# Requests with the same x-session-id, or of one gRPC conversation, go to one replica; others to any.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas there are, and what each takes of a node."""

    replicas: int = 1  # At least.
    most_replicas: int | None = None  # None: no more than `replicas`.
    target_requests: float | None = None  # Under way or queued, of each replica; None: three quarters of its rows.
    cpus: float = 1.0
    gpus: float = 0.0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0

    def __post_init__(self) -> None:
        if self.replicas < 1 or (self.most_replicas or self.replicas) < self.replicas:
            raise InvalidArgument(f"replicas go from at least 1 upwards, got {self.replicas} to {self.most_replicas}")


@serve.ingress()
class Replica:
    """One model. HTTP comes from Serve's proxies, rpcs from the gateway."""

    def __init__(self, setup: Setup):
        self._closing = ExitStack()
        self._worker, self._keys = self._closing.enter_context(setup.open())
        self._traffic = Traffic(setup.limits.calls)
        self._rpcs = Rpcs(self._worker, self._traffic)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app, as Serve asks for it once this is made."""
        return http_app(self._worker, self._keys, self._traffic)

    async def rpc(self, rpc: str, identity: Identity, requests: list[bytes]) -> AsyncGenerator[bytes | FotError]:
        """Answer a call that the gateway let in. The gateway cancels it when its client leaves."""
        answers = answer_here(self._rpcs, rpc, identity, requests)
        try:
            async for answer in answers:
                yield answer
        finally:
            await answers.aclose()

    def check_health(self) -> None:
        """Raise if no request could be answered; Serve then replaces this."""
        self._worker.engine.load()

    def __del__(self) -> None:
        """End, once Serve has let the requests under way finish; sessions are closed."""
        self._closing.close()


def application(setup: Setup, scale: Scale) -> Application:
    """Replicas of a model behind HTTP."""
    rows = setup.batch.max_rows
    autoscaling = AutoscalingConfig(
        min_replicas=scale.replicas,
        max_replicas=scale.most_replicas or scale.replicas,
        initial_replicas=scale.replicas,
        # A request that waits in a replica's queue is under way for Serve: this is the depth of the queue.
        target_ongoing_requests=scale.target_requests or max(1.0, 0.75 * rows),
        upscale_delay_s=scale.upscale_delay_s,
        downscale_delay_s=scale.downscale_delay_s,
    )
    deployment = serve.deployment(
        Replica,
        name=REPLICA,
        autoscaling_config=autoscaling,
        max_ongoing_requests=rows + setup.batch.max_queued,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        graceful_shutdown_timeout_s=30.0,
    )
    return deployment.bind(setup)


def gateway(setup: Setup, addresses: Addresses) -> Application:
    """The gRPC server before those replicas."""
    deployment = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=1,  # Another on the same node would find the port taken.
        ray_actor_options={"num_cpus": 0},
        user_config={},
        graceful_shutdown_timeout_s=addresses.drain_grace_s + 5,
    )
    return deployment.bind(setup.keys, setup.limits, addresses)


def deploy(setup: Setup, addresses: Addresses, scale: Scale, ray_address: str | None = None) -> str | None:
    """Serve on a Ray cluster, until `remove`; returns where gRPC listens, on the node of its gateway.

    Paths in `setup` and `addresses` are those of every node. Raises InvalidArgument for addresses that must not be
    served, FailedPrecondition if there is no Ray, RuntimeError if replicas do not start.
    """
    addresses.check(setup.keys is not None)
    connect(ray_address)
    if addresses.http is not None:
        host, port = split_address(addresses.http)
        serve.start(
            http_options=HTTPOptions(
                host=host,
                port=port,
                ssl_certfile=None if addresses.tls_certificate is None else str(addresses.tls_certificate),
                ssl_keyfile=None if addresses.tls_key is None else str(addresses.tls_key),
            )
        )
    serve.run(application(setup, scale), name=APPLICATION, route_prefix="/" if addresses.http is not None else None)
    if addresses.grpc is None:
        return None
    listening = serve.run(gateway(setup, addresses), name=GATEWAY, route_prefix=None)
    return str(listening.address.remote().result(timeout_s=30))


def remove() -> None:
    """Take both applications down; answers under way are finished first."""
    serve.delete(GATEWAY)
    serve.delete(APPLICATION)


# --- For Serve's configuration files --------------------------------------------------------------------------------


def build(args: Mapping[str, Any]) -> Application:
    """`application` of plain values: fields of `Setup`, and of `Scale` under "scale"."""
    return application(_setup(args), Scale(**args.get("scale", {})))


def build_grpc(args: Mapping[str, Any]) -> Application:
    """`gateway` of plain values: fields of `Setup`, and of `Addresses` under "addresses". It must be safe to serve."""
    addresses = _of_values(Addresses, {"http": None, "grpc": "127.0.0.1:50051"} | dict(args.get("addresses", {})))
    setup = _setup(args)
    addresses.check(setup.keys is not None)
    return gateway(setup, addresses)


_PATHS = frozenset({"model", "keys", "memory_tokens", "ca", "tls_certificate", "tls_key"})


def _setup(args: Mapping[str, Any]) -> Setup:
    given = {name: value for name, value in args.items() if name not in ("scale", "addresses")}
    if "mem_layers" in given:
        given["mem_layers"] = tuple(given["mem_layers"])
    model = str(given.get("model", ""))
    if model in reference.NAMES and not Path(model).is_dir():
        given["model"] = reference.path(model)
    return _of_values(Setup, {"name": Path(model).name} | given)


def _of_values(kind: Callable[..., Told], values: Mapping[str, Any]) -> Told:
    unknown = sorted(set(values) - set(signature(kind).parameters))
    if unknown:
        raise InvalidArgument(f"there is no {', '.join(unknown)}")
    return kind(
        **{name: Path(value) if name in _PATHS and value is not None else value for name, value in values.items()}
    )
