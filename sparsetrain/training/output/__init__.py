"""What a run writes and shows: its folder, metrics, reports, pictures, exports."""
