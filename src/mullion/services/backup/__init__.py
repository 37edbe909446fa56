"""Backups of partitions into repositories: what is kept, what runs, and how it comes back."""
