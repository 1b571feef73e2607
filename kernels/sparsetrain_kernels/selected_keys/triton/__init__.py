"""Triton kernels of attention over a selection: lists of keys by tile of rows, forward, backward."""
