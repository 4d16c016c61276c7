"""What a training loop needs of the worker's positions and memories; the loop itself may be anybody's."""
