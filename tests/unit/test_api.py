"""The public Python API: what it is, and that it stays."""

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest

import xtoken


def public() -> dict[str, Any]:
    """Parameters of what ``xtoken.__all__`` names, with their defaults; of classes their fields and members."""
    found: dict[str, Any] = {}
    for name in xtoken.__all__:
        one = getattr(xtoken, name)
        if inspect.isclass(one) and not issubclass(one, Exception):
            members = {key: shown(value) for key, value in vars(one).items() if not key.startswith("_")}
            fields = {key: "field" for key in getattr(one, "__annotations__", {}) if not key.startswith("_")}
            found[name] = members | fields
        else:
            found[name] = shown(one) if inspect.isfunction(one) else type(one).__name__
    return found


def shown(value: Any) -> str:
    """Without annotations, whose spelling changes with versions of libraries."""
    if not callable(value):
        return type(value).__name__
    signature = inspect.signature(value)
    plain = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def test_signatures_are_frozen(request: pytest.FixtureRequest) -> None:
    # A public name is a promise: adding one means adding it here, changing one needs a release of deprecation.
    frozen = json.loads((request.path.parent / "api.json").read_text())
    assert public() == frozen


def test_every_public_name_is_documented() -> None:
    for name in xtoken.__all__:
        one = getattr(xtoken, name)
        if callable(one):
            assert inspect.getdoc(one), name
            members = vars(one).items() if inspect.isclass(one) else ()
            for key, value in members:
                assert key.startswith("_") or not callable(value) or inspect.getdoc(value), f"{name}.{key}"


def test_a_name_imports_no_more_than_it_needs() -> None:
    code = (
        "import sys, xtoken; xtoken.open_capture; print('torch' in sys.modules, 'transformers' in sys.modules);"
        "xtoken.distillation_loss; print('torch' in sys.modules, 'vllm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]


def test_dir_and_star_name_them() -> None:
    assert {*xtoken.__all__} <= {*dir(xtoken)}
    names: dict[str, Any] = {}
    exec("from xtoken import *", names)
    assert {*xtoken.__all__} <= {*names}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = xtoken.nothing
