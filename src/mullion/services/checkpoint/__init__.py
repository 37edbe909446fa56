"""Checkpoints of partitions: frozen points in a partition's life, the layers that hold them, and their merging."""
