"""Stage 6: chunks in bytes, and each loss's targets in the student's terms."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtoken.schemas.configs.artifacts import AlignConfig
    from xtoken.schemas.manifest import TargetManifest
    from xtoken.schemas.ui.progress import Progress


def align(config: "AlignConfig", progress: "Progress") -> "TargetManifest":
    """See ``xtoken.pipeline.align.run.align``; numba is imported here and not with the package."""
    from xtoken.pipeline.align.run import align as run

    return run(config, progress)


def run_captures(config: "AlignConfig", progress: "Progress") -> "dict[str, Any]":
    """See ``xtoken.pipeline.align.multi_capture.run_captures``."""
    from xtoken.pipeline.align.multi_capture import run_captures as run

    return run(config, progress)


__all__ = ["align", "run_captures"]
