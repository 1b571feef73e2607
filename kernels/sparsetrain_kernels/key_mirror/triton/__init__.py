"""Appending in Triton: ``launch.py`` calls the kernel of ``kernels.py``."""
