"""Damaged and hostile inputs for everything that reads a file or a command line. `python -m scripts.fuzz --help`."""
