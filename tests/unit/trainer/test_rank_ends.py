"""How a rank ends that raised."""

import subprocess
import sys

import pytest

from xtoken.schemas.errors import VerificationError, XtokenError
from xtoken.trainer.ranks import abrupt_exit


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("CUDA error"), 1),
        (XtokenError("bad input"), 2),
        (VerificationError("damaged"), 3),
        (KeyboardInterrupt(), 1),
        (SystemExit(143), 143),
        (SystemExit("words"), 1),
        (SystemExit(0), None),
        (SystemExit(), None),
    ],
)
def test_a_rank_that_raised_under_nccl_does_not_leave_its_group(error: BaseException, code: int | None) -> None:
    assert abrupt_exit("nccl", error) == code
    assert abrupt_exit("gloo", error) is None


def test_the_end_comes_after_what_is_said_and_before_anything_that_could_wait() -> None:
    code = (
        "import atexit, time; from xtoken.trainer import ranks; "
        "atexit.register(time.sleep, 600); atexit.register(ranks._end, 7); print('said'); raise ValueError('this')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (7, "said\n")
    assert "ValueError: this" in done.stderr
