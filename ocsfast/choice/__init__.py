"""Which groups go: saliency, ranking, partition to a budget, stability (Eq. 2 to 6)."""
