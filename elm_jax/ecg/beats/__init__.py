"""Measurements of ECGs: beats, their averaged beat, its waves, and what these say, in numbers and in words."""
