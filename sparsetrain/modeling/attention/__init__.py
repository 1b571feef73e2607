"""What transformers calls for the attention of a layer: the call parsed once, padding, documents, and the method."""
