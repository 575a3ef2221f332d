"""xtoken: knowledge distillation from teachers that use another tokenizer, with the teacher computed once.

``xtoken --help`` shows the verbs. From Python: captures and targets as arrays, targets as a torch dataset, and the loss
for a training loop of your own. What ``__all__`` names is public: it changes with a release's notes, and what goes is
deprecated for one minor release first. Importing this package imports nothing else, so that ``import xtoken`` is free.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtoken.pipeline.query.samples import Capture, CaptureSample, open_capture
    from xtoken.schemas.errors import VerificationError, XtokenError
    from xtoken.trainer.data.dataset import TargetsDataset, targets_dataset
    from xtoken.trainer.data.samples_of_targets import TargetSample, TargetSet, open_targets
    from xtoken.trainer.distil import Distilled, distillation_loss

__all__ = [
    "Capture",
    "CaptureSample",
    "Distilled",
    "TargetSample",
    "TargetSet",
    "TargetsDataset",
    "VerificationError",
    "XtokenError",
    "__version__",
    "distillation_loss",
    "open_capture",
    "open_targets",
    "targets_dataset",
]

_MODULES = {
    "pipeline.query.samples": ("Capture", "CaptureSample", "open_capture"),
    "schemas.errors": ("VerificationError", "XtokenError"),
    "trainer.data.dataset": ("TargetsDataset", "targets_dataset"),
    "trainer.data.samples_of_targets": ("TargetSample", "TargetSet", "open_targets"),
    "trainer.distil": ("Distilled", "distillation_loss"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("xtoken")
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
