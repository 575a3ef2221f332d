"""Capture: plan the corpus, run a teacher over it in workers of one machine or many, commit part by part."""

from xtoken.pipeline.capture.executor import LocalExecutor
from xtoken.pipeline.capture.precompute import precompute
from xtoken.pipeline.capture.work import Executor, Job, Worker

__all__ = ["Executor", "Job", "LocalExecutor", "Worker", "precompute"]
