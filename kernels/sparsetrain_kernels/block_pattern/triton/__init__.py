"""Block-pattern attention in Triton: ``launch.py`` calls the kernels of the other files."""
