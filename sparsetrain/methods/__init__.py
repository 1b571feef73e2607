"""Attention methods, one file or folder each: the config (a recipe section) and the class that computes attention."""
