"""A run's folder: its files, checkpoints, and the weights that it holds."""
