"""Removing groups: from parameters, buffers, attributes, optimizer state, averages and shards."""
