"""The attention function that transformers calls: the call parsed once, padding, documents, and the method."""
