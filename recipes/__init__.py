"""The recipes that ship with sparsetrain."""
