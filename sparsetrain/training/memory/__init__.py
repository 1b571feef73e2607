"""What saves memory: checkpointed, offloaded and tiled layers, fused kernels, a quantised base."""
