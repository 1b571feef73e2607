"""Evaluation of long-context abilities: tasks (one file each), their runner, report and pictures."""
