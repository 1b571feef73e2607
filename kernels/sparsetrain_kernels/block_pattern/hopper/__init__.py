"""Block-pattern attention in Gluon for Hopper cards: ``launch.py`` calls the kernels of the other files."""
