"""Which parts of a text the last token's hidden states know of: a linear probe by layer and block."""
