"""The dataset card of a capture."""
