"""Token windows out of texts and datasets."""
