"""Decoding in Triton: ``launch.py`` calls the kernels of ``kernels.py``."""
