"""ocsfast: train, prune and finish a network in one training run."""
