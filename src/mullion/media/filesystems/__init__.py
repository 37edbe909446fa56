"""Filesystems inside disks: their volumes, their files, and what they do not use.

Its modules are imported one by one: who only shows files starts faster without what copies them.
"""
