"""Whether what runs in this container serves: exit code 0 if so. `health.py host:port` asks gRPC's health service.

A script of its own, for `fot` loads torch: seconds of processor time, every time a container is looked at.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PATIENCE_S = 5


def serving(address: str) -> bool:
    """Whether the whole of a service says SERVING; not if nobody answers."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}\n")
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1]) else 1)
