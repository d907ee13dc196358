"""Optimisers, aggregation of several tasks' gradients, training stability."""
