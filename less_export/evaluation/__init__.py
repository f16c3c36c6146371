"""What LESS does to a model's quality: perplexity against the full cache and against fair sparse baselines."""
