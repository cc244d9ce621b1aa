"""Tensors, models and adapters as files. Knows nothing of training."""
