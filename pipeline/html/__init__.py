"""What every HTML page of the project has: its frame, its style, and text made visible."""
