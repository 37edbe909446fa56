"""What `mullion vhd` promises in figures, measured against other programs: `make bench-vhd`, or `python -m bench.vhd`.

Both sides of a ratio do the same work with the same durability (an fsync at the end), in turns, the page cache warm.
"""
