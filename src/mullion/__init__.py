"""Mullion: a server virtualization platform on QEMU/KVM. The floors are drawn in docs/ARCHITECTURE.md."""

__version__ = "0.1.0"
