"""Data: raw tables become a dataset, prompts and training examples."""
