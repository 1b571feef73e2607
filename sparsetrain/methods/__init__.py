"""Attention methods: one file each, with the recipe section that configures it and the object that attends."""
