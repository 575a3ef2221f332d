"""Errors that a user can cause. Each message names the value, the rule and the way out.

Everything else that is raised is a defect of ours and keeps its traceback.
"""


class XtokenError(Exception):
    """Bad input or a refused request; the command line prints it without a traceback."""

    exit_code = 2


class VerificationError(XtokenError):
    """What lies on disk is not what its manifest says."""

    exit_code = 3


class IncompleteRun(XtokenError):
    """A run ended with shards set aside; what was committed stays and the same command resumes."""

    exit_code = 4
