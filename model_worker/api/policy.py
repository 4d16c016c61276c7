"""Which rpcs there are and who may call them."""

from __future__ import annotations

from collections.abc import Mapping

from memory_service.types.callers import Role
from model_worker.v1 import model_worker_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["ModelWorker"].full_name
# The least role of every rpc.
POLICY: Mapping[str, Role] = {
    "GetModel": Role.READ,
    "CreateCollection": Role.ADMIN,
    "PutDocuments": Role.WRITE,
    "GetDocument": Role.READ,
    "ListDocuments": Role.READ,
    "DeleteDocuments": Role.WRITE,
    "Generate": Role.READ,
    "Chat": Role.READ,
}
