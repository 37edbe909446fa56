"""This machine: what it offers, who may be its service, which user ids its partitions have."""

from mullion.host.facts import host_checks
from mullion.host.identity import allocate_uid, isolates, make_folder, prepare_host_folders, prepare_partition_folders
from mullion.host.lock import ServiceLock, running_service

__all__ = [
    "ServiceLock",
    "allocate_uid",
    "host_checks",
    "isolates",
    "make_folder",
    "prepare_host_folders",
    "prepare_partition_folders",
    "running_service",
]
