"""Estimating in Triton: ``launch.py`` calls the kernels of ``scores.py`` and ``bounds.py``."""
