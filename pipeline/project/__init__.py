"""W, the sparse map from student tokens to teacher tokens, and its audit."""

from pipeline.project.build import build_w
from pipeline.project.coverage import coverage
from pipeline.project.files import project, read_projection
from pipeline.project.projection import Projection

__all__ = ["Projection", "build_w", "coverage", "project", "read_projection"]
