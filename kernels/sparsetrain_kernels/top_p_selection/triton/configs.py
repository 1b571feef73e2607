"""Sizes of what the kernels look at in one go. No result depends on them."""

from __future__ import annotations

SHORT = 16384
"""Columns of a row, at most, that one program holds in registers: it then finds a threshold in one launch."""
SHORT_COLUMNS = 1024
"""Of a warp of that program."""
SHORT_REGISTERS = 128
"""Of a thread where such programs look for thresholds, so that two fit on a multiprocessor; 0 lets the compiler
choose."""
NUM_WARPS = 8
"""Of a program that has a row to itself, or a chunk of one."""
REGISTERS = 128
"""Of a thread where a program looks for the threshold of a long row."""
FEW = 4096
"""Candidates of a row that its program holds in registers, or of more the larger number."""
SOME = 8192
TILE = 2048
"""Columns that a program which has a row to itself searches at a time where it cannot hold them, the first of them in
registers."""
GATHER = 4096
"""Columns that it looks at at a time where there are many, and little is done with each."""
CHUNK = 4096
"""Columns of a program where many programs share a row."""
SIFT = 512
"""Columns of the rows of a group that one program sifts."""
SIFT_WARPS = 2
APART = 64
"""Integers from one count of candidates to the next: atomics on one line of the cache wait for one another."""
SAMPLE = 2048
"""Scores of a row, at least, from which the floor below its threshold is guessed."""
LARGE_SAMPLE = 8192
"""At most."""
SAMPLED = 32
"""One score in so many is in the sample, where that is between the two."""
PIECE = 4
"""Of these so many follow one another. Scores of neighbours are alike: longer pieces would say less, and shorter ones
read more of the row's sectors."""
GUESSES = 4
"""Numbers that are tried at a time, a power of two."""
TURNS = 4
"""Times that they are: the floor is found to the range of scores by ``GUESSES ** TURNS``."""
GUESS_WARPS = 8
DEVIATIONS = 4.5
"""Of the guess, that lie between it and the floor."""
