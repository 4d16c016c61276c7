"""The gRPC server: who calls, how much is let in, what went wrong, how long it took."""
