"""The command line: a face that uses client, model and base only, and imports a command's module when it is called."""

import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The entry point of the installed program."""
    try:
        from mullion.cli import root
    except KeyboardInterrupt:  # ^C before there is anything that could be told of it
        sys.stderr.write("\nmullion was interrupted\n")
        sys.exit(130)
    root.main()
