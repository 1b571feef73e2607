"""The ranks of a run: the launcher's environment, the DeepSpeed engine, shared sequences."""
