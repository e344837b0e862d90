"""How one answer compares with its truth: strings in, numbers out. Nothing here knows of models or files."""
