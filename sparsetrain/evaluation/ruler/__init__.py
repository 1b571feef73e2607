"""RULER (2404.06654): the prompts of its 13 tasks, made without a network, and their scores."""
