"""From a model to its families: what has to disappear together."""
