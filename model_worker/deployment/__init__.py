"""Many processes on many nodes. The only room that imports Ray."""
