"""`python -m realmap`: the same as the command."""

from realmap.cli import main

main()
