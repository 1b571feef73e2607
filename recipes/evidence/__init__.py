"""Small experiments that ask whether a scorer learns what to keep: recipes, and a runner that compares methods."""
