"""Supervision of a run: failures of other ranks, signals, errors, out of memory."""
