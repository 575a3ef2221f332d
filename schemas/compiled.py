"""How the project's loops are compiled: by numba, on first call, kept on disk so that worker processes start fast.

A compiled function calls none of another file: numba's disk cache would not see it change. While it runs, other threads
of Python do: what works on arrays needs no interpreter, and a loader's thread must not hold up one that feeds a GPU.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache

from xtoken.schemas.io.cache_folders import settle_home

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile on first call, for the types of its arguments; kept on disk where some folder can be written."""
    dispatcher = njit(function, nogil=True)
    dispatcher._cache = _cache(function) or dispatcher._cache
    return cast(_F, dispatcher)


def _cache(function: Callable[..., Any]) -> "_Cache | None":
    """Beside the source, else in the user's cache folder, else in ours (``schemas.io.cache_folders``), else nowhere."""
    if not os.path.isabs(os.path.expanduser("~")):  # numba would make a folder of that name here
        settle_home()
    for _ in range(2):
        try:
            return _Cache(function)
        except RuntimeError:  # numba finds no folder that it can write
            settle_home()
    return None


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's, but a folder that got full, lost or damaged costs the time to compile, and no more.

    What is kept for other types is not taken: two processes that compile one function for different types at the same
    moment give both the same file name; the index then names types whose file holds the other's code, which would
    read an int32 array as one of int64.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """See ``numba``; None where nothing can be read."""
        try:
            found = super().load_overload(sig, target_context)
            return found if found is not None and tuple(found.signature.args) == tuple(sig) else None
        except Exception:  # a damaged pickle raises anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """See ``numba``."""
        try:
            super().save_overload(sig, data)
        except Exception:  # as above
            self.disable()
