"""The families of models, as tables."""
