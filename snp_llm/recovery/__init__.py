"""A short training of a pruned model to say what the dense one says. Knows no files but its own."""
