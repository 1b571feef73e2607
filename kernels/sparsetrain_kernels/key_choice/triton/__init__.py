"""The Triton kernel of a choice of keys."""
