"""Benchmarks of the operations against the best that others have: one module a command of ``sparsetrain bench``."""
