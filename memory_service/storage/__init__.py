"""What lies on disk, and how: segments, the catalogue, tombstones, snapshots. The only room that touches files."""
