"""The actor that looks after a cluster: it hires keepers, publishes the shard map, heals, moves documents."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from memory_service.cluster.caretaker import Caretaker
from memory_service.cluster.directory import members_of, tell
from memory_service.errors import FotError
from memory_service.shards import Member, Shard, ShardMap
from model_worker.deployment.crew import Crew
from model_worker.deployment.plan import NAMESPACE, ClusterState, Copy, CopyState, Plan, Report, Start, overseer_name
from model_worker.deployment.registry import Registry
from model_worker.deployment.tenants import Tenants

HEAD = "node:__internal_head__"  # A resource that Ray gives to the head alone.
_FILE = "overseer.json"
_ROUND_S = 0.5
_LOOK_S = 5.0  # While documents are healed or moved, which may take hours.
_ILL_PAUSE_S = 2.0  # Between attempts to heal what cannot be healed yet.

log = logging.getLogger("fot.overseer")


class Overseer:
    """Looks after one cluster, in rounds. What it knows it can learn again: of keepers, of services, from its file."""

    def __init__(self, plan: Plan):
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self._plan = plan
        self._tenants = Tenants(plan.security)
        file = _own_directory(plan) / _FILE
        self._registry = Registry(f"ray://{plan.name}", file, self._tenants.place)
        self._shards = (again and self._registry.wanted) or plan.shards
        self._registry.want(self._shards)
        self._crew = Crew(plan)
        self._members: dict[str, Member | FotError] = {}
        self._doing = "starting"
        self._problem = ""
        self._given_up: set[int] = set()
        self._healed = self._looked = -math.inf
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._oversee, name="fot-overseer", daemon=True)
        self._thread.start()

    # --- Asked by others ---

    def map(self, above: int) -> ShardMap:
        """The shard map: one of an epoch above this, if there is one."""
        return self._registry.find(above)

    def security(self) -> tuple[bool, bool]:
        """Whether services speak TLS, and whether they ask for tokens."""
        return self._plan.security.tls_certificate is not None, self._plan.security.tokens is not None

    def state(self) -> ClusterState:
        """How the cluster is, as of the last round."""
        known = self._registry.known
        states = []
        for copy in self._crew.wanted:
            report = self._crew.reports.get(copy)
            problem = self._crew.problems.get(copy, "") or self._problem_of(report, known)
            states.append(CopyState(copy, report, problem))
        epoch = known.epoch if known else 0
        settled = known is not None and not known.also and set(known.ids) == self._ids
        doing = self._doing or ("" if settled else "changing the shards")
        return ClusterState(self._plan, os.getpid(), self._shards, epoch, tuple(states), doing, self._problem)

    def _problem_of(self, report: Report | None, known: ShardMap | None) -> str:
        """What is wrong with a copy whose keeper is well; empty: nothing."""
        if report is None:
            return "its keeper is starting"
        if not report.address:
            return report.problem or "its process is starting"
        member = self._members.get(report.address)
        if not isinstance(member, Member):
            return "it was not asked yet" if member is None else member.message
        if known is None or report.address not in known.addresses:
            return "the shard map does not have it yet"
        if member.map is None or member.behind:
            return "it may lack writes, and is being brought up to date"
        return ""

    def resize(self, shards: int) -> None:
        """Want so many shards from now on; their documents move in the background."""
        self._shards = shards
        self._registry.want(shards)

    def give_up(self, shard: int) -> None:
        """What a shard held, all of whose copies are gone, is not waited for any longer."""
        self._given_up.add(shard)

    def close(self, delete_data: bool) -> None:
        """Stop looking after the cluster, and every service."""
        self._stopping.set()
        self._thread.join()
        self._crew.dismiss(list(self._crew.wanted), delete_data)
        self._tenants.close()
        if delete_data:
            file = _own_directory(self._plan) / _FILE
            file.unlink(missing_ok=True)
            with suppress(OSError):
                file.parent.rmdir()  # Unless somebody else's data lie there.

    # --- Rounds ---

    def _oversee(self) -> None:
        while not self._stopping.wait(_ROUND_S):
            try:
                self._round()
                self._problem = ""
            except _Stopped:
                return
            except _Elsewhere:
                continue
            except FotError as error:
                self._tell(error.message)
            except Exception as error:  # Whatever it is, the next round may do better; an overseer must not end.
                log.exception("a round failed")
                self._tell(f"{type(error).__name__}: {error}")

    def _round(self) -> None:
        self._tenants.read()
        addresses = self._look()
        known = self._registry.known
        if known is None:
            self._publish_first(addresses)
            return
        caretaker = Caretaker(self._registry, self._tenants.lines)
        self._publish(caretaker, known, addresses)
        self._heal(caretaker)
        self._doing = ""
        self._move(caretaker, addresses)
        self._crew.dismiss([copy for copy in self._crew.wanted if copy not in self._copies()], delete_data=True)

    def _look(self) -> dict[Copy, str]:
        """See how keepers and services are, and hire keepers where they are missing; the addresses of services."""
        self._crew.want(self._copies())
        self._crew.look(self._registry, self._start_of)
        addresses = {copy: report.address for copy, report in self._crew.reports.items() if report.address}
        self._registry.reach(addresses.values(), self._tenants.place)
        self._members = members_of(addresses.values(), self._tenants.place)
        for one in self._members.values():
            self._registry.learn(one.map if isinstance(one, Member) else None)
        self._looked = time.monotonic()
        return addresses

    @property
    def _ids(self) -> set[str]:
        """The shards wanted, as the map has them."""
        return {f"s{number}" for number in range(self._shards)}

    def _copies(self) -> list[Copy]:
        """All copies there are to be: of the shards wanted, and of those that are still in the map."""
        known = self._registry.known
        ids = {shard.id for shard in (*known.shards, *known.also)} if known else set()
        numbers = {int(one[1:]) for one in ids} | set(range(self._shards))
        return [Copy(shard, replica) for shard in sorted(numbers) for replica in range(self._plan.replicas)]

    def _start_of(self, copy: Copy) -> Start:
        """How a copy without data may begin so that nothing is lost unseen."""
        known = self._registry.known
        ids = {shard.id for shard in (*known.shards, *known.also)} if known else set()
        siblings = [report for other, report in self._crew.reports.items() if other.shard == copy.shard]
        members = [self._members.get(report.address) for report in siblings]
        if copy.shard_id not in ids or any(isinstance(one, Member) and one.map is not None for one in members):
            return Start.EMPTY
        if copy.shard in self._given_up:
            return Start.SNAPSHOTS if self._plan.snapshots else Start.EMPTY
        return Start.NOT

    def _publish_first(self, addresses: dict[Copy, str]) -> None:
        """Tell a new cluster its map, once everybody is there."""
        self._doing = f"{len(addresses)} of {len(self._crew.wanted)} services are there"
        if len(addresses) < len(self._crew.wanted):
            return
        first = ShardMap(1, self._layout(addresses))
        first.check()
        away = tell(first, self._tenants.place)
        for error in away.values():
            raise error
        self._registry.learn(first)

    def _publish(self, caretaker: Caretaker, known: ShardMap, addresses: dict[Copy, str]) -> None:
        """Tell everybody the addresses that have changed."""
        shards = self._placed(known, addresses)
        if shards == known.everyone:
            return
        new = {address for shard in shards for address in shard.addresses} - set(known.addresses)
        empty = [a for a in new if isinstance(one := self._members.get(a), Member) and one.map is None]
        log.info("publishing new addresses: %s", ", ".join(sorted(new)))
        caretaker.publish(shards, empty)
        self._given_up -= {int(shard.id[1:]) for shard in shards if set(shard.addresses) & set(empty)}
        self._healed = -math.inf

    def _placed(self, known: ShardMap, addresses: dict[Copy, str]) -> tuple[Shard, ...]:
        """The map's shards, of both layouts, where they answer now: one that is filling from snapshots does not yet."""
        shards = []
        for shard in known.everyone:
            now = list(shard.addresses)
            for replica in range(len(now)):
                address = addresses.get(Copy(int(shard.id[1:]), replica), "")
                if isinstance(self._members.get(address), Member):
                    now[replica] = address
            shards.append(Shard(shard.id, tuple(now)))
        return tuple(shards)

    def _heal(self, caretaker: Caretaker) -> None:
        """Compare the replicas now and then, and at once if one says that it lacks writes or knows an old map."""
        known = self._registry.known
        ill = any(
            isinstance(one, Member) and (one.behind or one.map != known)
            for address, one in self._members.items()
            if known is not None and address in known.addresses
        )
        if self._plan.replicas == 1 and not ill:
            return
        if time.monotonic() - self._healed < (_ILL_PAUSE_S if ill else self._plan.heal_every_s):
            return
        if ill:
            self._doing = "healing"
        report = caretaker.heal(self._advance)
        self._healed = time.monotonic()
        if report.copied or report.deleted:
            log.info("healed: copied %d documents, deleted %d", report.copied, report.deleted)
        self._members = members_of(self._members, self._tenants.place)

    def _move(self, caretaker: Caretaker, addresses: dict[Copy, str]) -> None:
        """Change to the shards that are wanted; a change that was cut off goes on first."""
        known = caretaker.map
        if known.also:
            target = known.shards if known.switched else known.also
        else:
            wanted = self._ids
            if wanted == set(known.ids):
                return
            here = {copy: address for copy, address in addresses.items() if copy.shard_id in wanted}
            missing = self._shards * self._plan.replicas - len(here)
            if missing:
                self._doing = f"{missing} services of the new shards are starting"
                return
            kept = {shard.id: shard for shard in known.shards}
            target = tuple(kept.get(shard.id, shard) for shard in self._layout(here))
        self._doing = "moving documents"
        moved = caretaker.move(target, self._advance)
        self._doing = ""
        log.info("moved: copied %d documents, deleted %d", moved.copied, moved.deleted)

    def _layout(self, addresses: dict[Copy, str]) -> tuple[Shard, ...]:
        numbers = sorted({copy.shard for copy in addresses})
        replicas = range(self._plan.replicas)
        return tuple(Shard(f"s{n}", tuple(addresses[Copy(n, replica)] for replica in replicas)) for n in numbers)

    def _advance(self, text: str, part: int, whole: int) -> None:
        self._doing = f"{text}: {part:,} of {whole:,}"
        if self._stopping.is_set():
            raise _Stopped
        if time.monotonic() > self._looked + _LOOK_S:
            addresses = self._look()
            known = self._registry.known
            if known is not None and self._placed(known, addresses) != known.everyone:
                raise _Elsewhere

    def _tell(self, problem: str) -> None:
        if problem != self._problem:
            log.warning("%s", problem)
        self._problem = problem


class _Elsewhere(Exception):
    """A service answers at another address: the next round tells everybody, and goes on with what was begun."""


class _Stopped(Exception):
    """The overseer is told to stop while it moves documents, which goes on when it is started again."""


def appoint(plan: Plan) -> Any:
    """Start a cluster's overseer, or find the one there is. Gives the actor's handle.

    It runs where the head is: without that there is no cluster to look after.
    """
    return (
        ray.remote(Overseer)
        .options(
            name=overseer_name(plan.name),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources={HEAD: 0.001},
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=16,
        )
        .remote(plan)
    )


def _own_directory(plan: Plan) -> Path:
    own = ray.get_runtime_context().get_node_id()
    return plan.directory(next(node["NodeName"] for node in ray.nodes() if node["NodeID"] == own))
