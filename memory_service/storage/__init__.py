"""What lies on disk, and how: segments, the catalogue, tombstones, snapshots; and the file operations of all of it."""
