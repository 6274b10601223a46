"""The proof: a cut model computes what the whole model computes with the cut slices set to zero."""
