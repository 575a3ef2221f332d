"""Runs precompute with the settings in a JSON file; the tests kill it."""

import sys
from pathlib import Path

from pipeline.capture import precompute
from schemas.config import PrecomputeConfig
from schemas.progress import Silent

if __name__ == "__main__":
    precompute(PrecomputeConfig.model_validate_json(Path(sys.argv[1]).read_text()), Silent())
