"""The output of a run: run folder, metrics, reports, pictures, exports."""
