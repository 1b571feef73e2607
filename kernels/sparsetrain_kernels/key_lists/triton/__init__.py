"""The Triton kernels over tiles of rows, each with a list of keys and a range of neighbouring ones."""
