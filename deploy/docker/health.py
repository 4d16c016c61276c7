"""Whether what runs in this container serves: exit code 0 if so.

`health.py host:port` asks gRPC's health service, `health.py https://host:port/health` a page. A script of its own, for
`fot` loads torch: seconds of processor time, every time a container is looked at.
"""

import ssl
import sys
import urllib.request

PATIENCE_S = 5


def serving(address: str) -> bool:
    """Whether a service says that it serves; not if nobody answers."""
    return page_is_well(address) if "://" in address else service_is_well(address)


def page_is_well(url: str) -> bool:
    """Whether a page answers with a status below 400."""
    # The certificate is for the names that others use; this asks its own container, and sends nothing.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S, context=context):
            return True
    except OSError as error:
        sys.stderr.write(f"{url}: {error}\n")
        return False


def service_is_well(address: str) -> bool:
    """Whether the whole of a gRPC service says SERVING."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}\n")
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    sys.exit(0 if serving(sys.argv[1]) else 1)
