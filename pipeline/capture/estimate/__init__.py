"""What a capture will cost: a pilot on a sample of the corpus, and precompute --dry-run."""
