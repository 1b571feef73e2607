"""What a layer keeps of the past in generation, where its method has no memory of its own."""
