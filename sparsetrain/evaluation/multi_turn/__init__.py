"""Questions about one text that are answered in turn, from one cache."""
