"""Benchmarks of operations against other implementations: one module per command of ``sparsetrain bench``."""
