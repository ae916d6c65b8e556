"""What travels with a pruned model. Needs nothing but transformers."""
