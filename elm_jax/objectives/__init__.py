"""What is learnt: losses."""
