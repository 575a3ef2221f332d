"""Where workers run: in processes of this machine, or in actors of a Ray cluster."""
