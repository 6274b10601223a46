"""Labelled images: what a data set is, the ones that are known by name, and folders of one's own."""
