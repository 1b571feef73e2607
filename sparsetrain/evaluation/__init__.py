"""What a model can do with a long context: tasks, each one file, and what runs, reports and draws them."""
