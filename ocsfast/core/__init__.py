"""What every other room speaks in: options, errors, and the families that grouping finds."""
