"""The Triton kernels of attention over lists of keys."""
