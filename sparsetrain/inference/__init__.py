"""Text that a trained model writes: ``sparsetrain generate``."""
