"""A trained run as files for PyTorch: a Hugging Face folder, an adapter, safetensors, the reference's checkpoint."""
