"""What takes minutes to days: models trained, claims measured, ours timed against peers."""
