"""Token windows out of texts, pixels out of images, and the datasets that these come from."""
