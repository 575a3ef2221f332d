"""What lies on disk and in configurations. Imports nothing else of ours."""
