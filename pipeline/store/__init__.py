"""What lies on disk: codecs, Parquet files, commit records, and checks of all three. Import from the modules."""
