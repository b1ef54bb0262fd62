"""The Triton kernels without a GPU: their values under the interpreter, and their machine code from the compiler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ihvp
import pytest
import torch
from ihvp import ops
from ihvp.ops import _gpu
from ihvp.ops._registry import implementations
from op_cases import F32, make

CHILD = Path(__file__).with_name("triton_child.py")
OPS = [op for op, own in implementations().items() if "triton" in own]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")


def lines(*arguments: str) -> list[dict[str, Any]]:
    run = subprocess.run([sys.executable, CHILD, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    return lines("interpret")


@pytest.fixture(scope="module", params=("80", "90"))
def compiled(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return lines("compile", request.param)


def test_every_op_has_a_kernel() -> None:
    """But those that are factorisations and triangular solves, which are torch's."""
    assert set(implementations()) - set(OPS) == {"kfac_factorize", "kfac_solve"}


@pytest.mark.parametrize("op", OPS)
def test_values_under_the_interpreter(interpreted: list[dict[str, Any]], op: str) -> None:
    own = [line for line in interpreted if line["op"] == op]
    assert len(own) >= 6
    assert {line["case"]: line["error"] for line in own if line["error"]} == {}


@pytest.mark.parametrize("op", OPS)
def test_machine_code_keeps_to_registers(compiled: list[dict[str, Any]], op: str) -> None:
    own = [line for line in compiled if line["op"] == op]
    assert own and all(line["registers"] > 0 for line in own)
    assert [line for line in own if line["stack"]] == []


# --- the choice ------------------------------------------------------------------------------------------------


def test_the_package_imports_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None; import ihvp; assert not [m for m in sys.modules if '_triton.' in m]"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "installed", lambda implementation: False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        _gpu.triton("ghost_norm")(torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError, match="this build of ihvp has no CUDA kernels"):
        _gpu.cuda("ghost_norm")(torch.ones(1, 1, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is present")
def test_a_wish_without_a_device_says_so() -> None:
    with ihvp.use("triton"), pytest.raises(RuntimeError, match=r"for cpu tensors; .*; no CUDA device is present"):
        ops.ghost_norm(torch.ones(2, 3), torch.ones(2, 3))


@pytest.fixture
def op() -> Any:
    return ops.ghost_norm.__globals__["_op"]


def record(monkeypatch: pytest.MonkeyPatch, speedup: float, sources: str) -> None:
    entry = {"triton": {"speedup": {"large float32": speedup}, "sources": sources}}
    monkeypatch.setattr(_gpu, "record", lambda: {"sm_90": {"ghost_norm": entry}})


def test_nothing_unproven_is_chosen(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    present = ["reference", "triton"]
    monkeypatch.setattr(_gpu, "record", lambda: {})
    assert op._choose_on_gpu("sm_90", present, F32) == ("reference", "no kernel is proven on sm_90")
    record(monkeypatch, 3.0, "of another version")
    assert op._choose_on_gpu("sm_90", present, F32)[0] == "reference"


def test_the_fastest_proven_kernel_is_chosen(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    present = ["reference", "triton"]
    record(monkeypatch, 3.0, _gpu.sources("triton"))
    assert op._choose_on_gpu("sm_90", present, F32) == (
        "triton",
        "measured 3.0 times as fast as the reference on sm_90",
    )
    assert op._choose_on_gpu("sm_80", present, F32)[0] == "reference"
    assert op._choose_on_gpu("sm_90", ["reference"], F32)[0] == "reference"
    assert op._choose_on_gpu("sm_90", present, torch.float64) == ("reference", "float64 operands have no kernel")
    assert op._choose_on_gpu("sm_90", present, torch.bfloat16) == ("reference", "no kernel is proven on sm_90")
    assert op._choose_on_gpu("sm_90", present, F32, "small") == ("reference", "no kernel is proven on sm_90")
    record(monkeypatch, 0.9, _gpu.sources("triton"))
    assert op._choose_on_gpu("sm_90", present, F32) == ("reference", "no faster kernel is proven on sm_90")


def test_an_accumulator_may_be_wider_than_the_kernels() -> None:
    for name, wide in (("covariance_update_", False), ("ekfac_self_influence", True)):
        call = make(name, {}, accumulator=torch.float64, factors=torch.float64 if wide else None)
        own = getattr(ops, name).__globals__["_op"]
        assert (own._widest(tuple(call.arguments.values())) == torch.float64) == wide


def test_the_record_names_known_ops_and_implementations() -> None:
    for found in _gpu.record().values():
        for name, entries in found.items():
            assert set(entries) <= set(implementations()[name]) - {"reference", "native"}
            for entry in entries.values():
                assert set(entry) == {"speedup", "sources"}
                assert all(re.fullmatch("(small|large|huge) (float32|bfloat16)", kind) for kind in entry["speedup"])


def test_the_record_is_what_was_measured() -> None:
    """The least speed over the reference of each kernel, size and type among the results of that device."""
    results = Path(__file__).parents[1] / "bench" / "results" / "nvidia-h200.jsonl"
    measured: dict[tuple[str, str, str], float] = {}
    for result in map(json.loads, results.read_text().splitlines()):
        if result["bench"] in ("gpu", "gpu every op"):
            times, kind = result["milliseconds"], f"{result['size']} {result['dtype']}"
            for name in set(times) & {"triton", "cuda"}:
                key, speed = (result["op"], name, kind), round(times["reference"] / times[name], 2)
                measured[key] = min(measured.get(key, speed), speed)
    assert measured == {
        (op, name, kind): speed
        for op, entries in _gpu.record()["sm_90"].items()
        for name, entry in entries.items()
        for kind, speed in entry["speedup"].items()
    }


# --- memory ------------------------------------------------------------------------------------------------------


def test_workspace_is_halved_once_and_then_named() -> None:
    limits: list[int] = []

    def make_up_to(limit: int) -> Any:
        def make_one(chunk: int) -> int:
            limits.append(chunk)
            if chunk > limit:
                raise torch.OutOfMemoryError("too much")
            return chunk

        return make_one

    assert _gpu.workspace("an op", 10, 8, make_up_to(10)) == (10, 10)
    assert _gpu.workspace("an op", 10, 8, make_up_to(5)) == (5, 5)
    with pytest.raises(torch.OutOfMemoryError, match=r"an op needs 4\.0 MiB of workspace for 4 of 8 at a time"):
        _gpu.workspace("an op", 8, 1 << 20, make_up_to(3))
    assert limits == [10, 10, 5, 8, 4]
    assert _gpu.workspace("an op", 10, _gpu.WORKSPACE, make_up_to(10)) == (1, 1)
    assert _gpu.workspace("an op", 10, 2 * _gpu.WORKSPACE, make_up_to(10)) == (1, 1)
