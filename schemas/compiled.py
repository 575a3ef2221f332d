"""How the project's loops are compiled: by numba, on first call, kept on disk so that worker processes start fast.

A compiled function calls none of another file: numba's disk cache would not see it change.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile on first call, for the types of its arguments."""
    dispatcher = njit(cache=True)(function)
    dispatcher._cache = _Cache(function)
    return cast(_F, dispatcher)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's, but what is kept for other types is not taken.

    Two processes that compile one function for different types at the same moment give both the same file name: the
    index then names types whose file holds the other's code, which would read an int32 array as one of int64.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """See ``numba``."""
        found = super().load_overload(sig, target_context)
        return found if found is not None and tuple(found.signature.args) == tuple(sig) else None
