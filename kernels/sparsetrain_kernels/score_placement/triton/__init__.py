"""The normalisation of scores in Triton: one program a head."""
