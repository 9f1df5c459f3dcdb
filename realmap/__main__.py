"""`python -m realmap`, and the command `realmap`: a process that does nothing else."""

import gc

from realmap.cli import main


def run() -> None:
    """Runs the command; what was imported for it stays, and is not looked through for garbage again and again."""
    gc.freeze()
    main()


if __name__ == "__main__":
    run()
