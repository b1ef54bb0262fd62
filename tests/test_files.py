"""Files and states that cannot be loaded."""

from __future__ import annotations

import re
from pathlib import Path

import ihvp
import pytest
import torch
from nets import METHODS, Pooled, chain
from safetensors.torch import save_file
from sound_problem import Case, check, ekfac, loader, model, own


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "curvature.safetensors"
    ekfac.save(path)
    whole = path.read_bytes()

    def file(content: bytes) -> Path:
        other = tmp_path / "other"
        other.write_bytes(content)
        return other

    foreign, future = tmp_path / "foreign", tmp_path / "future"
    save_file({"weight": torch.ones(3)}, foreign)
    save_file({}, future, metadata={"ihvp": "1", "method": "OtherIHVP", "config": "{}", "layers": "{}"})
    name = re.escape(repr(str(tmp_path / "other")))
    others = r"of another model: it has layers .*'0': \(5, 5\), '2': \(3, 6\).*this model "
    cases: list[Case] = [
        (lambda: ihvp.load(tmp_path / "missing", own), FileNotFoundError, r"no such file: .*missing"),
        (
            lambda: ihvp.load(file(b"not a file of ours, but text"), own),
            ValueError,
            name + " is not a safetensors file",
        ),
        (lambda: ihvp.load(file(b""), own), ValueError, name + " is not a safetensors file"),
        (lambda: ihvp.load(file(whole[: len(whole) // 2]), own), ValueError, name + " is not a safetensors file"),
        (lambda: ihvp.load(file(whole[:-1]), own), ValueError, name + " is not a safetensors file"),
        (
            lambda: ihvp.load(foreign, own),
            ValueError,
            r"foreign' is not a file that an IHVP object of this version saved",
        ),
        (lambda: ihvp.load(future, own), ValueError, r"future' is not a file that an IHVP object"),
        (lambda: ihvp.load(path, own.net), TypeError, r"^model must be an ihvp\.InfluenceModel, got Sequential"),
        (lambda: ihvp.load(path, model(chain(4, 6, 3))), ValueError, others + r".*'0': \(6, 5\), '2': \(3, 7\)"),
        (lambda: ihvp.load(path, model(Pooled())), ValueError, others + r".*'embed'"),
        (lambda: ihvp.load(path, model(layers=["2"])), ValueError, others + r"\{'2': \(3, 6\)\}"),
        (lambda: ihvp.load(path, model(chain(4, 5, 3, bias=False))), ValueError, others + r".*'0': \(5, 4\)"),
        (lambda: ekfac.save(tmp_path / "no" / "such" / "folder"), FileNotFoundError, r"no/such"),
    ]
    for case in cases:
        check(*case)


@pytest.mark.parametrize("method", ["kfac pi", "ekfac", "diagonal", "fisher", "hessian"])
def test_a_state_of_another_method_or_model_is_refused(method: str) -> None:
    name = METHODS[method].cls.__name__
    curvature = METHODS[method](own, loader)
    others = [other for other in ("kfac pi", "ekfac", "diagonal", "fisher", "hessian") if other != method]
    states = [METHODS[other](own, loader).state_dict() for other in others]
    states.append(METHODS[method](model(chain(4, 6, 3)), loader).state_dict())
    for state in states:
        check(lambda state=state: curvature.load_state_dict(state), ValueError, rf"{name}.*(model|method)")
