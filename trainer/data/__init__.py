"""Stored targets to batches: what a rank reads, in which order, and how it becomes a forward pass."""
