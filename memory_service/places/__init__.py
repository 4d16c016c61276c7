"""Where a memory is: a store in this process, or one service over gRPC, behind one interface."""
