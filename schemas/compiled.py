"""How the project's loops are compiled: by numba, on first call, kept on disk so that worker processes start fast.

A compiled function calls none of another file: numba's disk cache would not see it change.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile on first call, for the types of its arguments."""
    return cast(_F, njit(cache=True)(function))
