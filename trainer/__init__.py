"""Parquet to student: batches, losses, loop, evaluation, reports. Never imports pipeline."""
