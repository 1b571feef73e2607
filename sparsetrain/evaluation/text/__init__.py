"""Loss on held-out text: windows, losses of tokens, and what is said of them."""
