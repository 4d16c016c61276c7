"""A memory over many nodes, from the outside: brought up, changed, watched and taken down by whoever drives Ray."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from memory_service.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from memory_service.shards import MAX_REPLICAS, MAX_SHARDS
from model_worker.deployment.connection import ask, clusters, connect, overseer
from model_worker.deployment.local_ray import LocalRay
from model_worker.deployment.overseer import appoint
from model_worker.deployment.plan import ClusterState, Plan

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
DATA = "~/.local/share/fot"
_LOOK_S = 0.3
_BEGIN_S = 180.0  # Of an overseer: it loads torch, on however busy a machine.
_CLOSE_S = 120.0
_OF_CLIENTS = ("FOT_TARGET", "FOT_TOKEN", "FOT_TOKEN_FILE", "FOT_CA", "FOT_DEBUG")
_OF_KEEPERS = ("FOT_DATA", "FOT_LISTEN", "FOT_TOKENS", "FOT_TLS_CERTIFICATE", "FOT_TLS_KEY", "FOT_TLS_CLIENT_CA",
               "FOT_INSECURE", "FOT_METRICS", "FOT_STORE__SNAPSHOTS")  # fmt: skip


def settings_of(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What services take from the environment of who brings them up: settings of `fot serve`, never a token."""
    left_out = (*_OF_CLIENTS, *_OF_KEEPERS)
    named = [one for one in sorted(environment) if one.startswith("FOT_") and one not in left_out]
    return tuple((one, environment[one]) for one in (*named, "OMP_NUM_THREADS") if one in environment)


def plan_of(name: str, environment: Mapping[str, str], **given: Any) -> Plan:
    """The plan by which a cluster runs, or the usual one, with the fields that are given and not None."""
    try:
        state = state_of(name)
        usual = replace(state.plan, shards=state.shards)
    except NotFound:
        replicas = min(2, sum(node["Alive"] for node in ray.nodes()))
        usual = Plan(name, 1, replicas, DATA, settings=settings_of(environment))
    return replace(usual, **{field: value for field, value in given.items() if value is not None})


def bring_up(plan: Plan, give_up: Sequence[int] = ()) -> ClusterState:
    """Start the cluster of that plan on the Ray this process is connected to; one that runs gets its shards.

    Returns at once, with work under way: see `watch`. Raises InvalidArgument if the plan cannot be, and
    FailedPrecondition if the cluster runs by another one.
    """
    _check(plan)
    try:
        handle = overseer(plan.name)
    except NotFound:
        _check_exposure(plan)
        handle = appoint(plan)
    state: ClusterState = ask(handle.state.remote(), _BEGIN_S)
    running = replace(state.plan, shards=plan.shards)
    if running != plan:
        raise FailedPrecondition(f"{plan.name} runs already, and not as asked ({_differences(running, plan)}): only "
                                 "the number of its shards can change")  # fmt: skip
    for shard in give_up:
        ask(handle.give_up.remote(shard))
    if state.shards != plan.shards:
        ask(handle.resize.remote(plan.shards))
    return state_of(plan.name)


def state_of(name: str) -> ClusterState:
    """How a cluster is. Raises NotFound."""
    found: ClusterState = ask(overseer(name).state.remote())
    return found


def watch(name: str, timeout_s: float | None = None) -> Iterator[ClusterState]:
    """How a cluster is, again and again until it is as wanted. Raises Unavailable after `timeout_s`."""
    until = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        try:
            state = state_of(name)
        except Unavailable:
            state = None  # Its overseer is being restarted.
        if state is not None:
            yield state
            if state.ready:
                return
        if until is not None and time.monotonic() > until:
            raise Unavailable(f"{name} is not as wanted after {timeout_s:g} s: {told(state) if state else 'no answer'}")
        time.sleep(_LOOK_S)


def told(state: ClusterState) -> str:
    """What a cluster is busy with or lacks, in one line."""
    problems = [f"{one.copy}: {one.problem}" for one in state.copies if one.problem]
    return "; ".join([one for one in (state.problem, state.doing) if one] + problems) or "ready"


def take_down(name: str, delete_data: bool = False) -> bool:
    """Stop a cluster's services and actors; whether a Ray that `fot up` started here for it ended too.

    With `delete_data` nothing of it stays on the disks of the nodes that are there. Raises NotFound.
    """
    handle = overseer(name)
    with suppress(Unavailable):
        ask(handle.close.remote(delete_data), _CLOSE_S)
    ray.kill(handle, no_restart=True)
    local = LocalRay.running()
    if local is None or clusters() or ray.get_runtime_context().gcs_address != local.address:
        return False
    ray.shutdown()
    local.stop()
    return True


def join(address: str | None, starts: Callable[[], None] = lambda: None) -> None:
    """Connect to the Ray at an address, or the one that is known here; else start one on this machine.

    `starts` is called before one is started, which takes seconds.
    """
    if not ray.is_initialized() and not (address or os.environ.get("RAY_ADDRESS") or LocalRay.running()):
        starts()
        LocalRay.start()
    connect(address)


def _check(plan: Plan) -> None:
    if not _NAME.fullmatch(plan.name):
        raise InvalidArgument(f"a cluster's name is small letters, digits and hyphens, got {plan.name!r}")
    if not 1 <= plan.shards <= MAX_SHARDS:
        raise InvalidArgument(f"a cluster has 1 to {MAX_SHARDS} shards, got {plan.shards}")
    if not 1 <= plan.replicas <= MAX_REPLICAS:
        raise InvalidArgument(f"a shard has 1 to {MAX_REPLICAS} replicas, got {plan.replicas}")
    security = plan.security
    if bool(security.tls_certificate) != bool(security.tls_key):
        raise InvalidArgument("TLS needs both a certificate and its key")
    if security.tokens and not security.token_files:
        raise InvalidArgument("with --tokens the overseer needs an admin's token to look after the services: give "
                              "--token-file, once for every tenant")  # fmt: skip


def _check_exposure(plan: Plan) -> None:
    """Raise InvalidArgument if services would have to be reached from other machines and are not protected."""
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and not plan.security.network:
        raise InvalidArgument(
            "the nodes of this Ray are several machines, and documents can be read out of keys and values: add TLS "
            "(--tls-certificate, --tls-key, --ca) and tokens (--tokens, --token-file), or say --insecure if the "
            "network is trusted"
        )


def _differences(one: Plan, other: Plan) -> str:
    names = [name for name in Plan.__dataclass_fields__ if getattr(one, name) != getattr(other, name)]
    return ", ".join(names)
