"""The ranks of a run: the launcher's environment, the DeepSpeed engine, sequence parallelism."""
