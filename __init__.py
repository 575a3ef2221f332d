"""xtoken: knowledge distillation from teachers that use another tokenizer, with the teacher computed once.

``xtoken --help`` shows the verbs. Importing this package imports nothing else, so that ``import xtoken`` is free.
"""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("xtoken")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
