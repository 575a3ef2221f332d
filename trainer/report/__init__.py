"""Plots and tables: they read metrics and stores only."""
