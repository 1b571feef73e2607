"""The memory of layers in generation, for methods without a memory of their own, and the keys that a step reads."""
