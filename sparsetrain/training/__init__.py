"""Training on a DeepSpeed engine: the loop, its loss, schedule, checkpoints, self-checks and tracking."""
