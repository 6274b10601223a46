"""The proof: a cut model computes what the dense one computes without the groups."""
