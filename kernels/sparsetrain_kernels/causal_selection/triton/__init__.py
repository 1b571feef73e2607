"""The causal selection in Triton: launches, each beside the file of its kernels."""
