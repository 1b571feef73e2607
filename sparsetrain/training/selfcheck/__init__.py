"""What a run proves of itself on its first batch."""
