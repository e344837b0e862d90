"""Weights that PyTorch saved as a run folder: checkpoints of the reference and of encoders, adapters of PEFT."""
