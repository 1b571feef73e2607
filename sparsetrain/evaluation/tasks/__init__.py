"""The evaluation tasks, each one file."""
