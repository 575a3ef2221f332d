"""W, the sparse map from student tokens to teacher tokens, and its audit."""

from xtoken.pipeline.project.build import build_w
from xtoken.pipeline.project.coverage import Audit, coverage
from xtoken.pipeline.project.files import project, read_projection
from xtoken.pipeline.project.learned import moved_rows, write_learned
from xtoken.pipeline.project.projection import Projection

__all__ = ["Audit", "Projection", "build_w", "coverage", "moved_rows", "project", "read_projection", "write_learned"]
