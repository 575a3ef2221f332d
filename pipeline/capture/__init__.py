"""Capture: plan the corpus, run a teacher over it in workers of one machine or many, commit part by part."""

from pipeline.capture.executor import LocalExecutor
from pipeline.capture.precompute import precompute
from pipeline.capture.work import Executor, Job, Worker

__all__ = ["Executor", "Job", "LocalExecutor", "Worker", "precompute"]
