"""W, the sparse map from student tokens to teacher tokens, and its audit."""

from pipeline.project.build import build_w
from pipeline.project.coverage import Audit, coverage
from pipeline.project.files import project, read_projection
from pipeline.project.learned import moved_rows, write_learned
from pipeline.project.projection import Projection

__all__ = ["Audit", "Projection", "build_w", "coverage", "moved_rows", "project", "read_projection", "write_learned"]
