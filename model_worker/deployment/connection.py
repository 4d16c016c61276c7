"""This process as a driver of a Ray cluster, and the clusters of memory that it finds there."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError

from memory_service.errors import FailedPrecondition, FotError, NotFound, Unavailable
from model_worker.deployment.local_ray import LocalRay
from model_worker.deployment.plan import NAMESPACE, overseer_name
from model_worker.deployment.runtime import ADDRESS, join, member

_ASK_S = 15.0


def connect(address: str | None = None) -> None:
    """Connect to a Ray cluster, unless this process is: at `address`, RAY_ADDRESS, or the one `fot up` started here.

    Raises FailedPrecondition if there is none to connect to, and what `join` raises.
    """
    if address is None and not member() and not os.environ.get(ADDRESS) and LocalRay.running() is None:
        raise FailedPrecondition(f"there is no Ray here: start one with `fot up --ray`, or set {ADDRESS}")
    join(address)


def clusters() -> list[str]:
    """The clusters of memory that run on this Ray, by name."""
    suffix = overseer_name("")
    found = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if one["namespace"] == NAMESPACE]
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def overseer(name: str) -> Any:
    """The handle of a cluster's overseer. Raises NotFound."""
    try:
        return ray.get_actor(overseer_name(name), namespace=NAMESPACE)
    except ValueError:
        there = ", ".join(clusters())
        told = f"there {'are' if ',' in there else 'is'} {there}" if there else "start it with `fot up --ray`"
        raise NotFound(f"no memory cluster called {name!r} runs on this Ray; {told}") from None


def ask(answer: Any, timeout_s: float = _ASK_S) -> Any:
    """What an actor answered. Raises its FotError as it is, Unavailable if it did not answer."""
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FotError):
            raise error.cause from None
        raise
    except (ActorUnavailableError, GetTimeoutError):
        raise Unavailable("the overseer of the cluster does not answer; Ray may just be restarting it") from None
    except RayError as error:
        # Of one that could not begin, the last line says why.
        why = str(error).strip().rpartition("\n")[2].strip()
        raise Unavailable(f"the overseer of the cluster is not there: {why}") from None
