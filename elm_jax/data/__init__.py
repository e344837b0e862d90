"""From recordings and conversations to batches on the host; nothing in here imports jax."""
