"""One training run: when things happen, what is reported, what is saved to resume."""
