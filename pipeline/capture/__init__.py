"""Capture: plan the corpus, run a teacher over it in workers of one machine or many, commit part by part."""

from xtoken.pipeline.capture.precompute import precompute
from xtoken.pipeline.executors.local import LocalExecutor
from xtoken.pipeline.executors.protocol import Executor, Job, Worker

__all__ = ["Executor", "Job", "LocalExecutor", "Worker", "precompute"]
