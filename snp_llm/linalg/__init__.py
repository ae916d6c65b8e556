"""The mathematics of subspace node pruning on plain tensors. Knows no transformers, no nn.Module, no files."""
