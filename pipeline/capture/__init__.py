"""Capture: plan the corpus, run a teacher over it in worker processes, commit part by part."""

from pipeline.capture.executor import Executor, Job, LocalExecutor, Worker
from pipeline.capture.precompute import precompute

__all__ = ["Executor", "Job", "LocalExecutor", "Worker", "precompute"]
