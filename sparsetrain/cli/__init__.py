"""The ``sparsetrain`` command: a file a command. Each imports what it needs when it is called: help is instant, and
recipes need no torch."""

from sparsetrain.cli.entry import app, main, script

__all__ = ["app", "main", "script"]
