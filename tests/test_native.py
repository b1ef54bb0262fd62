"""The extension module by itself: how it reads arrays, what it refuses, and how it picks an instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from ihvp import _native, ops
from op_cases import ISAS, NATIVE_OPS, make
from torch import Tensor

KERNELS = {op.removesuffix("_"): op for op in NATIVE_OPS if hasattr(_native, op.removesuffix("_"))}
ORDERS = {"ekfac_diagonal_update": "project_first", "gradient_dot": "query_first"}
RESULTS = {
    "eigenbasis_project": (5, 4, 8),
    "eigenbasis_rotate": (3, 3, 7),
    "ekfac_self_influence": (5,),
    "ekfac_solve": (1, 3, 3, 7),
    "weighted_ghost_dot": (3, 5),
    "ghost_dot": (3, 5),
    "ghost_norm": (5,),
    "gradient_dot": (3, 5),
    "per_sample_gradient": (5, 3, 8),
    "kfac_solve": (3, 3, 7),
}


def arguments(kernel: str, **changes: Any) -> dict[str, Any]:
    """A right call of the kernel: N=5, T=4, M=3, Q=3, I=7 and a bias where there is one, O=3, float32."""
    given = make(KERNELS[kernel], {}, bias=True, masked=True).arguments
    if kernel == "ekfac_solve":
        given["damping"] = [0.1]
    if kernel in ORDERS:
        given["order"] = ORDERS[kernel]
    if kernel == "ghost_dot":
        given["bias1"] = given["bias2"] = given.pop("bias")
        given["per_token"] = False
    if kernel in ("covariance_update", "ekfac_diagonal_update", "gradient_dot", "weighted_ghost_dot"):
        given["precision"] = "float32"
    if kernel in RESULTS:
        given["out"] = torch.zeros(RESULTS[kernel])
    return {**given, "threads": 1, **changes}


def result(given: dict[str, Any]) -> Any:
    return next(given[name] for name in ("out", "C", "Lambda") if name in given)


@pytest.mark.parametrize("kernel", KERNELS)
def test_arrays_by_dlpack_are_read_like_tensors(kernel: str) -> None:
    """numpy has no exchange API: its arrays come through __dlpack__, and are written through it."""
    assert hasattr(np.ndarray, "__dlpack__") and not hasattr(np.ndarray, "__dlpack_c_exchange_api__")
    tensors = arguments(kernel)
    arrays = {name: x.numpy().copy() if isinstance(x, Tensor) else x for name, x in tensors.items()}
    for given in (tensors, arrays):
        getattr(_native, kernel)(**given)
    assert np.array_equal(result(tensors).numpy(), result(arrays))
    assert result(tensors).any()


def test_a_view_that_runs_backwards_is_read_as_it_appears() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    C, backwards = np.zeros((2, 4, 4), np.float32)
    _native.covariance_update(C, x, None, False, "float32", 1)
    _native.covariance_update(backwards[::-1, ::-1], x[::-1, ::-1], None, False, "float32", 1)
    assert np.array_equal(C, backwards)


MEMORY = torch.zeros(400)

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # results that overlap
    ("covariance_update", {"C": torch.zeros(8).expand(8, 8)}, "^C overlaps itself in memory"),
    ("covariance_update", {"C": MEMORY.as_strided((8, 8), (1, 1))}, "^C overlaps itself in memory"),
    ("covariance_update", {"C": MEMORY[:64].view(8, 8), "x": MEMORY[60:200].view(5, 4, 7)}, "^C overlaps x in"),
    ("ekfac_diagonal_update", {"Lambda": MEMORY[:24].view(3, 8), "U_G": MEMORY[20:29].view(3, 3)}, "^Lambda overlaps"),
    ("gradient_dot", {"out": torch.zeros(1, 5).expand(3, 5)}, "^out overlaps itself in memory"),
    ("gradient_dot", {"out": MEMORY[:15].view(3, 5), "P": MEMORY[:72].view(3, 3, 8)}, "^out overlaps P in memory"),
    ("ekfac_solve", {"out": MEMORY[:63].view(1, 3, 3, 7), "V": MEMORY[:63].view(3, 3, 7)}, "^out overlaps V in memory"),
    # results of another shape, memory or type
    ("covariance_update", {"C": torch.zeros(7, 7)}, r"^C must have shape \(8, 8\), got \(7, 7\)"),
    ("eigenbasis_project", {"out": torch.zeros(5, 4, 7)}, r"^out must have shape \(5, 4, 8\)"),
    ("eigenbasis_project", {"out": torch.zeros(5, 8, 4).mT}, "^out must be contiguous"),
    ("eigenbasis_project", {"out": MEMORY.as_strided((5, 4, 8), (32, 9, 1))}, "^out "),
    (
        "eigenbasis_project",
        {"out": MEMORY.as_strided((1, 4, 8), (32, 40, 1)), "x": torch.ones(1, 4, 7), "mask": None},
        "^out must be contiguous",
    ),
    ("gradient_dot", {"out": torch.zeros(5, 3)}, r"^out must have shape \(3, 5\), got \(5, 3\)"),
    ("gradient_dot", {"out": torch.zeros(3, 5, dtype=torch.float16)}, "^out must be float32 or float64"),
    ("kfac_solve", {"V": torch.zeros(3, 3, 7, dtype=torch.float64)}, "^out must be float64 for float64 operands"),
    # operands
    ("gradient_dot", {"P": torch.zeros(3, 7, 8)}, r"^P must have shape \(3, 3, 8\), got \(3, 7, 8\)"),
    ("gradient_dot", {"delta": torch.zeros(5, 3, 3)}, r"^delta must have shape \(5, 4, 3\)"),
    ("gradient_dot", {"mask": torch.ones(5, 3, dtype=torch.bool)}, r"^mask must have shape \(5, 4\)"),
    ("gradient_dot", {"mask": torch.ones(5, 4)}, "^mask must be bool"),
    ("gradient_dot", {"a": torch.ones(5, 4, 7, dtype=torch.bool)}, "^a must be floating point, got bool"),
    ("gradient_dot", {"a": torch.ones(5, 4, 7, dtype=torch.int64)}, "^a must be float32, float64, bfloat16, float16"),
    ("gradient_dot", {"a": torch.ones(5, 4, 1, 1, 7)}, "^a has too many dimensions"),
    ("gradient_dot", {"a": None}, "^a must be a tensor, got None"),
    ("gradient_dot", {"a": [1.0]}, "^a must be a tensor"),
    ("ekfac_solve", {"damping": [0.1, 1.0]}, r"^out must have shape \(2, 3, 3, 7\), got \(1, 3, 3, 7\)"),
    ("ekfac_diagonal_update", {"U_G": None, "order": "gradient_first"}, "gradient_first needs both"),
    ("weighted_ghost_dot", {"weight": torch.zeros(8, 3)}, r"^weight must have shape \(3, 8\)"),
    # how to run
    *((kernel, {"threads": threads}, "^threads must be at least 1") for kernel in KERNELS for threads in (0, -1)),
    ("gradient_dot", {"order": "last_first"}, "^order must be .*got last_first"),
    ("gradient_dot", {"order": "project_first"}, "^order must be .*got project_first"),
    ("gradient_dot", {"order": ""}, "^order must be "),
    ("gradient_dot", {"P": torch.zeros(3, 8)}, r"^P must have shape"),
    ("weighted_ghost_dot", {"precision": "low"}, "^precision must be float32, bf16x3, bf16, int8x3 or int16, got low"),
    ("gradient_dot", {"order": "gradient_first", "per_token": True, "out": torch.zeros(3, 5, 4)}, "needs query_first"),
    ("ekfac_diagonal_update", {"order": "query_first"}, "^order must be .*got query_first"),
]


@pytest.mark.parametrize(("kernel", "changes", "message"), REFUSED)
def test_wrong_arguments_are_named(kernel: str, changes: dict[str, Any], message: str) -> None:
    given = arguments(kernel, **changes)
    before = result(given).clone()
    with pytest.raises(ValueError, match=message):
        getattr(_native, kernel)(**given)
    assert torch.equal(result(given), before)


def test_tensors_without_memory_here_are_refused() -> None:
    for x in (torch.ones(5, 4, 7, device="meta"), torch.ones(5, 4, 7).to_sparse()):
        with pytest.raises((RuntimeError, BufferError, ValueError)):
            _native.covariance_update(**arguments("covariance_update", x=x))


# --- instruction sets ------------------------------------------------------------------------------------------


def test_the_best_instruction_set_is_chosen() -> None:
    assert ISAS and _native.isa() == os.environ.get("IHVP_ISA", ISAS[0])
    for isa in ISAS:
        _native.use_isa(isa)
        assert _native.isa() == isa


@pytest.mark.parametrize("name", ["nonsense", "", *(isa for isa, runs in _native.isas().items() if not runs)])
def test_an_instruction_set_that_is_not_here_is_refused(name: str) -> None:
    before = _native.isa()
    with pytest.raises(ValueError, match=f"instruction set must be one of .*{ISAS[-1]}, got {name}"):
        _native.use_isa(name)
    assert _native.isa() == before


def imported_with(isa: str) -> subprocess.CompletedProcess[str]:
    program = "import ihvp; from ihvp import _native; print(_native.isa())"
    environment = {**os.environ, "IHVP_ISA": isa}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_the_environment_chooses_the_instruction_set() -> None:
    run = imported_with(ISAS[-1])
    assert (run.returncode, run.stdout.strip()) == (0, ISAS[-1]), run.stderr


def test_an_unknown_instruction_set_in_the_environment_stops_the_import() -> None:
    run = imported_with("nonsense")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(("ValueError: ", "ImportError: "))
    assert "instruction set must be one of" in last and last.endswith("got nonsense")


def test_no_kernel_is_visible_outside_the_module() -> None:
    """A weak or exported symbol of one instruction set could be taken for another's."""
    nm = shutil.which("nm")
    assert nm is not None, "nm comes with the compiler that built the extension"
    symbols = "".join(
        subprocess.run([nm, *flags, "-C", _native.__file__], check=True, capture_output=True, text=True).stdout
        for flags in (["-D", "--defined-only"], ["--defined-only"])
    ).splitlines()
    assert any(line.endswith(" T PyInit__native") for line in symbols)
    exported = [line for line in symbols if line.split()[1] in "TWVuDBR"]
    assert not [line for line in exported if any(f"ihvp::{isa}" in line for isa in _native.isas())]


# --- the processor's peak --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_peak_counts_what_it_does(isa: str, dtype: str) -> None:
    before = _native.isa()
    _native.use_isa(isa)
    try:
        once = _native.peak(dtype, 1, 1)
        assert once > 0 and _native.peak(dtype, 1000, 2) == 2000 * once
        assert (_native.peak("float32", 1, 1), _native.peak("float64", 1, 1)) in ((once, once / 2), (2 * once, once))
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_has_a_peak_where_there_are_tiles(isa: str) -> None:
    before = _native.isa()
    _native.use_isa(isa)
    try:
        if isa == "amx":
            tile = 2 * 16 * 16 * 32
            assert _native.peak("bfloat16", 10, 2) == 2 * 10 * 6 * tile
        else:
            with pytest.raises(ValueError, match=f"bfloat16 needs the instruction set amx, in use is {isa}"):
                _native.peak("bfloat16", 1, 1)
    finally:
        _native.use_isa(before)


@pytest.mark.parametrize(
    ("dtype", "rounds", "threads", "message"),
    [
        ("float16", 1, 1, "^dtype must be float32, float64 or bfloat16, got float16"),
        ("float32", 0, 1, "^rounds must be at least 1, got 0"),
        ("float32", 1, 0, "^threads must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_of_the_peak_are_named(dtype: str, rounds: int, threads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _native.peak(dtype, rounds, threads)


@pytest.mark.parametrize("accumulator", (torch.float32, torch.float64))
@pytest.mark.parametrize(("N", "T", "d"), ((3, 11, 32), (1, 70, 131), (40, 53, 70)), ids=str)
def test_covariance_of_bfloat16_tokens(isa: str, N: int, T: int, d: int, accumulator: torch.dtype) -> None:
    """Beyond one chunk of positions, at sizes that fill no tile, with gaps between rows; whatever lies there stays."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, d, T + 3, generator=generator).bfloat16().mT[:, 3:]
    mask = torch.rand(N, T, generator=generator) < 0.8
    C = torch.full((d + 4, d + 4), 2.0, dtype=accumulator)
    ops.covariance_update_(C[1 : d + 2, 2 : d + 3], x, mask=mask, bias=True)
    rows = torch.cat([x, x.new_ones(N, T, 1)], dim=2)[mask].double()
    want = torch.full_like(C, 2.0, dtype=torch.float64)
    want[1 : d + 2, 2 : d + 3] += rows.mT @ rows
    assert float((C - want).norm() / want.norm()) < 3e-6  # a thousand terms are summed in float32


def test_covariance_of_bfloat16_tokens_that_are_not_finite(isa: str) -> None:
    x = torch.ones(64, 40, dtype=torch.bfloat16)
    x[3, 5], x[9, 17], x[20] = torch.inf, torch.nan, 0.0
    x[3, 6] = 0.0
    C = torch.zeros(40, 40, dtype=torch.float64)
    ops.covariance_update_(C, x)
    torch.testing.assert_close(C, x.double().mT @ x.double(), equal_nan=True)


@pytest.mark.parametrize(("T", "O", "I"), ((16, 9, 40), (37, 200, 31), (300, 33, 193)), ids=str)
def test_gradient_dot_of_bfloat16_tokens(isa: str, T: int, O: int, I: int) -> None:
    """At sizes that fill no tile, beyond one block of positions, of outputs and of inputs."""
    generator = torch.Generator().manual_seed(0)
    Q, N = 3, 8
    P = torch.randn(Q, O, I + 1, generator=generator)
    a = torch.randn(N, I, T, generator=generator).bfloat16().mT
    delta = torch.randn(N, T, O + 2, generator=generator).bfloat16()[..., 1:-1]
    mask = torch.rand(N, T, generator=generator) < 0.8
    x, d = make_pair(a, delta, mask)
    want = torch.einsum("qoi,nto,nti->qn", P.double(), d, x)
    got = torch.empty(Q, N)
    _native.gradient_dot(got, P, a, delta, mask, True, False, "gradient_first", "float32", 2)
    assert float((got - want).norm() / want.norm()) < 3e-6


def make_pair(a: Tensor, delta: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in float64 with the bias feature written out and masked positions zero."""
    x = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2).double()
    return x * mask.unsqueeze(2), delta.double() * mask.unsqueeze(2)
