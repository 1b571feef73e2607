"""SPARSEK of the rows of a matrix in Triton: one program a row."""
