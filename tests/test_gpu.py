"""Every op on a CUDA device, on every implementation present, against its float64 formula."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import ihvp
import pytest
import torch
from gpu_cases import CASES, GROUPS, LARGE
from grouped_cases import GROUPED, group_formula, make_group
from ihvp import ops
from ihvp.ops import _gpu
from ihvp.ops._registry import DEVICES, GPU, implementations
from nets import cross_entropy
from op_cases import BF16, F32, SPECS, Call, make
from tolerance import assert_close
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is present"),
]


def on_gpu(op: str) -> list[str]:
    return [
        name for name in implementations()[op] if "cuda" in DEVICES[name] and (name not in GPU or _gpu.installed(name))
    ]


RUNS = [(op, name) for op in SPECS for name in on_gpu(op)]
GROUP_RUNS = [(op, name) for op in GROUPED for name in on_gpu(op)]


def moved(value: Any) -> Any:
    """To the device, with the same strides."""
    if isinstance(value, list):
        return [moved(x) for x in value]
    if not isinstance(value, Tensor):
        return value
    out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return out.copy_(value) if 0 not in value.stride() else value.cuda()


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Skips what a kernel says it is not for."""
    try:
        yield
    except RuntimeError as error:
        if 'which "reference" takes' not in str(error):
            raise
        pytest.skip(str(error))


def run(call: Call, implementation: str) -> None:
    call, want = call.fresh(), call.formula()
    there = call.replace(**{name: moved(x) for name, x in call.arguments.items()})
    with ihvp.use(implementation), taken():
        result = there()
    call.check(tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu(), want)


@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize(("op", "implementation"), RUNS)
def test_formula(op: str, implementation: str, case: str) -> None:
    dims, how = {**CASES, **LARGE}[case]
    if op == "kfac_factorize" and case in ("no inputs", "bias alone", "no outputs"):
        dims = {}
    call = make(op, dims, **how)
    run(call, implementation)


@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize(("op", "implementation"), GROUP_RUNS)
def test_groups(op: str, implementation: str, case: str) -> None:
    arguments = make_group(op, **GROUPS[case])
    with ihvp.use(implementation):
        got = getattr(ops, op)(**{name: moved(x) for name, x in arguments.items()})
    for x, want in zip(got if isinstance(got, list) else [got], group_formula(op, arguments), strict=True):
        assert_close(x.cpu(), want, x.dtype, 3 * 70 * 66)


# A relative error of 2^-11 for every rounded operand, of 2^-9 for those kept in bfloat16; Lambda sums squares.
LIMITS = {"high": 2e-3, "medium": 1e-2}


@pytest.mark.parametrize("precision_name", LIMITS)
@pytest.mark.parametrize(("op", "implementation"), [run for run in RUNS if run[1] in GPU])
def test_lower_precisions_keep_to_their_error(op: str, implementation: str, precision_name: str) -> None:
    call = make(op, {"N": 9, "T": 64, "I": 128, "O": 96, "Q": 20}, BF16 if precision_name == "medium" else F32).fresh()
    want = call.formula()
    torch.set_float32_matmul_precision(precision_name)
    with ihvp.use(implementation), taken():
        result = call.replace(**{name: moved(x) for name, x in call.arguments.items()})()
    error = (result.cpu().double() - want).norm() / want.norm()
    assert error <= (1e-5 if op in ("eigenbasis_rotate", "ekfac_solve") else LIMITS[precision_name])


@pytest.mark.parametrize(("op", "implementation"), [run for run in RUNS if "N T I" in SPECS[run[0]].shapes.values()])
def test_addresses_beyond_31_bits(op: str, implementation: str) -> None:
    """Two examples, 2^31 elements apart."""
    call = make(op, {"N": 2, "T": 3, "I": 16, "O": 16}, BF16, factors=F32).fresh()
    want = call.formula()
    there = {name: moved(x) for name, x in call.arguments.items()}
    for name, letters in SPECS[op].shapes.items():
        if letters == "N T I":
            x, memory = there[name], torch.empty(2**31 + 64, dtype=BF16, device="cuda")
            there[name] = memory.as_strided(x.shape, (2**31, x.shape[2], 1)).copy_(x)
    with ihvp.use(implementation), taken():
        result = call.replace(**there)()
    call.check(result.cpu(), want)


def test_what_is_not_proven_here_is_not_chosen() -> None:
    kind = _gpu.device_class(torch.device("cuda", 0))
    for op in SPECS:
        call = make(op, {}).fresh()
        there = call.replace(**{name: moved(x) for name, x in call.arguments.items()})
        chosen = ihvp.explain(getattr(ops, op), **there.arguments).implementation
        assert chosen == "reference" or chosen in _gpu.speedups(op, kind, F32, "small")


def test_operands_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="delta must be on the device of a, cuda:0, got cpu"):
        ops.ghost_norm(torch.ones(2, 3, device="cuda"), torch.ones(2, 3))


def test_float64_operands_have_no_kernel() -> None:
    x = torch.ones(2, 3, dtype=torch.float64, device="cuda")
    assert ihvp.explain(ops.ghost_norm, x, x).implementation == "reference"
    with ihvp.use("triton"), pytest.raises(RuntimeError, match='has no "triton" implementation for float64 operands'):
        ops.ghost_norm(x, x)


@pytest.mark.parametrize("implementation", ["reference", *(name for name in GPU if name == "triton")])
def test_scores_of_a_net_are_those_of_the_cpu(implementation: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    x, y = torch.randn(64, 20), torch.randint(5, (64,))
    found = []
    for device in ("cpu", "cuda"):
        data = [(own.to(device), targets.to(device)) for own, targets in zip(x.split(16), y.split(16), strict=True)]
        model = ihvp.InfluenceModel(copy.deepcopy(net).to(device), nn.CrossEntropyLoss(reduction="none"))
        with ihvp.use(implementation) if device == "cuda" else contextlib.nullcontext():
            curvature = ihvp.EKFACIHVP(model, data, damping="auto")
            found.append(ihvp.FirstOrderInfluenceCalculator(model, data, curvature).scores(data[:1]).cpu())
    assert (found[1] - found[0]).norm() <= 1e-3 * found[0].norm()


@pytest.mark.parametrize("implementation", ["reference", *(name for name in GPU if name == "triton")])
def test_token_scores_and_queries_of_low_rank_are_those_of_the_cpu(implementation: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(19, 14), nn.Tanh(), nn.Linear(14, 16))  # with subspaces that are whole
    x, y = torch.randn(12, 40, 19), torch.randint(16, (12, 40))
    found = []
    for device in ("cpu", "cuda"):
        data = [(own.to(device), targets.to(device)) for own, targets in zip(x.split(4), y.split(4), strict=True)]
        model = ihvp.InfluenceModel(copy.deepcopy(net).to(device), cross_entropy)
        curvature = ihvp.EKFACIHVP(model, data, damping="auto")
        calculator = ihvp.FirstOrderInfluenceCalculator(model, data, curvature, query_rank=7)
        with ihvp.use(implementation) if device == "cuda" else contextlib.nullcontext():
            parts = [calculator.scores_by_token(data[:1], of=of) for of in ("position", "loss")]
            found.append(torch.stack([torch.cat([scores for _, scores in own], dim=1).cpu() for own in parts]))
    assert (found[1] - found[0]).norm() <= 1e-3 * found[0].norm()
