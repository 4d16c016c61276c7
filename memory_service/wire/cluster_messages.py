"""Shard maps and placements as protobuf messages, and back, as in `messages`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memory_service.shards import MAX_SHARDS, Member, Placement, Shard, ShardMap
from memory_service.v1 import memory_pb2 as pb
from memory_service.verbs import SetShardMap
from memory_service.wire.messages import check_count


def write_placement(placement: Placement | None) -> pb.Placement | None:
    return None if placement is None else pb.Placement(shard=placement.shard, shards=placement.shards)


def read_placement(request: Any) -> Placement | None:
    """The placement of a request that may have one."""
    if not request.HasField("placement"):
        return None
    check_count(len(request.placement.shards), MAX_SHARDS, "placement.shards")
    # A shard among none owns nothing, and the first of none cannot be found.
    return Placement(request.placement.shard, tuple(request.placement.shards) or ("",))


def write_map(found: ShardMap) -> pb.ShardMap:
    return pb.ShardMap(
        epoch=found.epoch, shards=_write_shards(found.shards), also=_write_shards(found.also), switched=found.switched
    )


def read_map(message: pb.ShardMap) -> ShardMap:
    check_count(len(message.shards), MAX_SHARDS, "map.shards")
    check_count(len(message.also), MAX_SHARDS, "map.also")
    return ShardMap(message.epoch, _read_shards(message.shards), _read_shards(message.also), message.switched)


def fill_member(member: Member, message: Any) -> Any:
    """The response, filled."""
    if member.map is not None:
        message.map.CopyFrom(write_map(member.map))
    message.shard = member.shard
    message.behind = member.behind
    message.whole = member.whole
    return message


def read_member(message: Any) -> Member:
    found = read_map(message.map) if message.HasField("map") else None
    return Member(found, message.shard, message.behind, message.whole)


def write_set_map(verb: SetShardMap) -> pb.SetShardMapRequest:
    return pb.SetShardMapRequest(map=write_map(verb.map), shard=verb.shard, behind=verb.behind, whole=verb.whole)


def read_set_map(request: pb.SetShardMapRequest) -> SetShardMap:
    behind = request.behind if request.HasField("behind") else None
    return SetShardMap(read_map(request.map), request.shard, behind, request.whole)


def _write_shards(shards: Iterable[Shard]) -> list[pb.Shard]:
    return [pb.Shard(id=shard.id, addresses=shard.addresses) for shard in shards]


def _read_shards(messages: Iterable[pb.Shard]) -> tuple[Shard, ...]:
    return tuple(Shard(one.id, tuple(one.addresses)) for one in messages)
