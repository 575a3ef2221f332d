"""Plots that read metrics only."""
