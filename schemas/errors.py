"""Errors that a user can cause. Each message names the value, the rule and the way out.

Everything else that is raised is a defect of ours and keeps its traceback.
"""

from typing import Any


class XtokenError(Exception):
    """Bad input or a refused request; the command line prints it without a traceback."""

    exit_code = 2


class VerificationError(XtokenError):
    """What lies on disk is not what its manifest says."""

    exit_code = 3


class Unreachable(XtokenError):
    """A server does not answer now, or says that it cannot: trying again later may help."""


class IncompleteRun(XtokenError):
    """A run ended with shards set aside; what was committed stays and the same command resumes."""

    exit_code = 4


class PartlyDone(XtokenError):
    """Some of what was asked for is done, some failed; ``figures`` say which."""

    def __init__(self, message: str, figures: dict[str, Any], exit_code: int) -> None:
        super().__init__(message)
        self.figures, self.exit_code = figures, exit_code
