"""`python -m mullion.cli`: the same as the installed `mullion`."""

from mullion.cli.root import main

if __name__ == "__main__":
    main()
