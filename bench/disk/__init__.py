"""Benchmarks of disks that run: `python -m bench.disk`."""
