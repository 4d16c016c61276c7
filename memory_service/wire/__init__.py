"""Verbs, tensors and errors as protobuf messages and gRPC statuses, both ways."""
