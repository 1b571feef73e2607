"""Attention over a selection in Gluon for Hopper cards: ``launch.py`` calls the kernels of the other files."""
