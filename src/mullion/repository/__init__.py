"""Backup repositories: deduplicated, encrypted chunks of disks in a folder, on an SFTP server or in an S3 bucket.

`Repository.create` and `.open`, `begin_backup`, `Repository.backups`, `.open_disk`; the format is described in
`docs/formats/repository.md`. It knows bytes in a repository, and nothing of partitions beyond their names.
"""

from mullion.repository.backend import Backend
from mullion.repository.backup import BackupWriter, begin_backup
from mullion.repository.disk import BackupDisk
from mullion.repository.manifest import Manifest, Stored
from mullion.repository.repository import Repository

__all__ = ["Backend", "BackupDisk", "BackupWriter", "Manifest", "Repository", "Stored", "begin_backup"]
