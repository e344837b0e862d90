"""Using a trained model: generation and chat."""
