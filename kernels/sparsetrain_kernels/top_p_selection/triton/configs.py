"""Sizes of what the kernels look at in one go. No result depends on them."""

from __future__ import annotations

NUM_WARPS = 8
"""Of a program that has a row to itself, or a chunk of one."""
TILE = 2048
"""Columns that a program which has a row to itself searches at a time, the first of them in registers."""
GATHER = 4096
"""Columns that it looks at at a time where there are many, and little is done with each."""
CHUNK = 4096
"""Columns of a program where many programs share a row."""
SIFT = 512
"""Columns of the rows of a group that one program sifts."""
SIFT_WARPS = 2
SAMPLE = 2048
"""Scores of a row from which the floor below its threshold is guessed."""
PIECE = 4
"""Of these so many follow one another. Scores of neighbours are alike: longer pieces would say less, and shorter ones
read more of the row's sectors."""
GUESSES = 4
"""Numbers that are tried at a time, a power of two."""
TURNS = 5
"""Times that they are: the floor is found to the range of scores by ``GUESSES ** TURNS``."""
GUESS_WARPS = 8
DEVIATIONS = 4.5
"""Of the guess, that lie between it and the floor."""
