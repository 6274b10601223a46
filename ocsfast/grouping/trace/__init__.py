"""A model's forward pass as a graph, and what its code did with sizes and attributes on the way."""
