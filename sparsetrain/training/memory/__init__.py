"""Saving memory: activation checkpointing and offloading, tiled MLPs, fused kernels, a quantised base."""
