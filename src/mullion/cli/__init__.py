"""The command line: a face that uses client, model and base only, and imports a command's module when it is called."""

from mullion.cli.root import main

__all__ = ["main"]
