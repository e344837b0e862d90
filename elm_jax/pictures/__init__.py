"""ECG paper, plots, braille, SVG and pages."""
