"""What watches a run: the other ranks, signals, faults, memory that runs out."""
