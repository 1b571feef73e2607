"""The ``sparsetrain`` command, one file per command. Imports are lazy: help is fast and recipes need no torch."""

from sparsetrain.cli.entry import app, main, script

__all__ = ["app", "main", "script"]
