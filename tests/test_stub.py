"""The extension's stub lists what the extension has, with the same argument names."""

import ast
import re
from pathlib import Path

import ihvp
from ihvp import _native


def test_stub_is_fresh() -> None:
    stub = ast.parse(Path(ihvp.__file__).with_name("_native.pyi").read_text())
    written = {f.name: [a.arg for a in f.args.args] for f in stub.body if isinstance(f, ast.FunctionDef)}
    present = {}
    for name, function in vars(_native).items():
        if callable(function):
            signature = re.match(rf"{name}\((.*?)\) ->", function.__doc__)
            assert signature, name
            present[name] = re.findall(r"(\w+): ", signature[1])
    assert written == present
