"""Runs precompute with the settings in a JSON file, as ``xtoken precompute`` would; the tests kill it.

The file holds ``config`` (a PrecomputeConfig) and ``job`` (fields of ``fault_jobs.FaultyJob``, or null).
"""

import json
import sys
from pathlib import Path

from fault_jobs import FaultyJob

from xtoken.pipeline.capture import precompute
from xtoken.pipeline.capture.worker import CaptureJob
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.ui.progress import Silent


def main(path: str) -> int:
    """The exit code."""
    settings = json.loads(Path(path).read_text())
    config = PrecomputeConfig.from_flat(**settings["config"])
    job = settings["job"]
    try:
        precompute(config, Silent(), make_job=CaptureJob if job is None else FaultyJob.maker(job))
    except XtokenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
