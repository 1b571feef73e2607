"""Training on a DeepSpeed engine: loop, loss, schedule, checkpoints, self-checks and tracking."""
