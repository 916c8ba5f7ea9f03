"""Run the command line by ``python -m refilled`` or ``torchrun -m refilled``."""

from refilled.cli import main

if __name__ == "__main__":
    main()
