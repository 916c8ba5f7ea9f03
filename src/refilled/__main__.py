"""``python -m refilled``, and so ``torchrun -m refilled``, is the command line."""

from refilled.cli import main

if __name__ == "__main__":
    main()
