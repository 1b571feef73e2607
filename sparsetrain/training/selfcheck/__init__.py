"""The self-check of a run on its first batch, before step 1."""
