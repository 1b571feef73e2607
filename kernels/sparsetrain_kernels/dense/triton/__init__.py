"""The Triton kernels of causal attention of chosen rows."""
