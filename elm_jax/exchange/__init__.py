"""Weights to and from PyTorch: exported folders, imported checkpoints, one table read in both directions."""
