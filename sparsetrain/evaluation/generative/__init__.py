"""What tasks share in which the model writes an answer: prompts, texts, and how long these are."""
