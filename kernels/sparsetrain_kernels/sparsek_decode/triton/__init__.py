"""A step of SparseK's generation in Triton: ``launch.py`` calls the kernels of ``update.py`` and ``attention.py``."""
