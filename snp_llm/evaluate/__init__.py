"""How well and how fast models are, pruned ones or not. Knows nothing of pruning."""
