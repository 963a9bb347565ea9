"""What a run leaves on disk: its folder, metrics, checkpoints and the errors of its ranks."""
