"""A model run from its own traced graph."""
