"""From generated answers to scores, controls and pictures."""
