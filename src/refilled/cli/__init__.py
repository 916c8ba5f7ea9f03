"""The command line."""

from refilled.cli.app import main

__all__ = ["main"]
