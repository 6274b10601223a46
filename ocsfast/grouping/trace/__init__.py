"""The model's graph, traced with everything put back that a forward pass writes."""
