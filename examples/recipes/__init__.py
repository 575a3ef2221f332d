"""Runs for a GPU node, with the papers' data and models: ``python -m examples.recipes``."""
