"""Attention methods, a file or a folder each: the recipe section that configures it, and the object that attends."""
