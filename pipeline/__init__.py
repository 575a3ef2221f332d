"""Text to Parquet: corpus, tokens, teachers, capture, project, align, store. Never imports trainer."""
