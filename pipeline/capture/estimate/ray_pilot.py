"""The pilot of a dry run on a machine of the cluster that has the GPUs of a worker; the driver's may have none."""

import os
import tempfile

from xtoken.pipeline.capture.estimate.pilot import Pilot, take_pilot
from xtoken.pipeline.executors.ray_actor import check_version
from xtoken.pipeline.executors.ray_cluster import import_ray, joined
from xtoken.schemas.configs.capture import PrecomputeConfig
from xtoken.schemas.errors import XtokenError
from xtoken.schemas.manifest import code_version
from xtoken.schemas.ui.progress import Progress, Silent


def take_pilot_on_ray(config: PrecomputeConfig, tokens: int, gpus: float, progress: Progress) -> Pilot:
    """See ``take_pilot``; with so many GPUs of one machine of the cluster.

    Raises:
        XtokenError: as ``take_pilot``, or the GPUs are taken, or what runs there died.
    """
    assert config.run.ray is not None
    ray = import_ray()
    progress.start("pilot on the cluster", None, "bytes")
    with joined(config.run.ray, 1):
        free = ray.available_resources().get("GPU", 0.0)
        if free < gpus:
            raise XtokenError(
                f"the pilot needs {gpus:g} GPUs and the cluster has {free:g} free now; say --dry-run when some are, or "
                "on a machine with a GPU without --ray"
            )
        # its process ends with it, and gives the GPU back
        pilot = ray.remote(num_cpus=1, num_gpus=gpus, max_calls=1, max_retries=0)(_pilot)
        try:
            result: Pilot = ray.get(pilot.remote(code_version(), config, os.getcwd(), tokens))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, XtokenError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise XtokenError(f"the pilot died on the cluster: {' '.join(str(error).split())[:500]}") from error
    progress.finish()
    return result


def _pilot(version: str, config: PrecomputeConfig, cwd: str, tokens: int) -> Pilot:
    check_version(version)
    if os.path.isdir(cwd):  # what relative paths mean
        os.chdir(cwd)
    with tempfile.TemporaryDirectory(prefix="xtoken-dry-run-") as scratch:
        return take_pilot(config.model_copy(update={"out": scratch}), tokens, Silent())
