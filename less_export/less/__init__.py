"""The method: the operator's reference, its simulation over whole sequences, kernels and eviction policies."""
