"""A model that runs from its own traced graphs, in which every size can be cut."""
