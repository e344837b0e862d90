"""Weights in and out: safetensors files, rules between names and parameters, loading straight into shards."""
