"""Sizes of what the kernels look at in one go. No result depends on them."""

from __future__ import annotations

NUM_WARPS = 8
CHUNK = 4096
"""Columns of a program where many programs share a row."""
TILE = 2048
"""Columns that a program which has a row to itself looks at at a time."""
ALONE = 16384
"""Columns up to which one program finds the threshold of a row by itself: more launches would take longer."""
SAMPLE = 4096
"""Scores of a row from which the threshold is guessed."""
PIECE = 4
"""Of these so many follow one another. Scores of neighbours are alike: longer pieces would say less, and shorter ones
read more of the row's sectors."""
DEVIATIONS = 4.5
"""Of the guess, that lie between it and either end of the bracket around it."""
CANDIDATES = 4
"""One in so many scores may lie in the bracket; where there are more, one program reads the whole row."""
