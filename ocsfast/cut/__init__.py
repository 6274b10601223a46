"""Removing groups from parameters, buffers, attributes, optimizer states, averages and shards."""
