"""Learning from pairs of a preferred and a rejected answer."""
