"""Below torch's "highest" float32 matmul precision: sums over positions as products of 16-bit integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ihvp
import pytest
import torch
from ihvp import _native, ops
from ihvp.ops._precision import float32_products
from nets import chain, squared_error
from op_cases import BF16, F32, F64, LAYOUTS, Call, make
from torch import Tensor

OPS = ("covariance_update_", "ekfac_diagonal_update_", "gradient_dot")
LIMIT = 2**-11  # a relative error of norms: what TF32 rounds one operand by

# Blocks of 128 positions and of as many features, panels of 48, tiles of 8: both sides of each, and what is too short.
SHAPES: tuple[dict[str, int | None], ...] = (
    {"N": 3, "T": 33, "I": 7, "O": 5},
    {"N": 2, "T": 127, "I": 48, "O": 47},
    {"N": 5, "T": 128, "I": 129, "O": 49, "Q": 7},
    {"N": 3, "T": 300, "I": 97, "O": 200, "Q": 5},
    {"N": 1, "T": 1100, "I": 40, "O": 33},
    {"N": 90, "T": 16, "I": 130, "O": 65},
    {"N": 40, "T": 3, "I": 70, "O": 9},
    {"N": 300, "T": None, "I": 70, "O": 9},
)


@pytest.fixture(autouse=True)
def precision() -> None:
    torch.set_float32_matmul_precision("high")


def cases(op: str, shape: dict[str, int | None]) -> Iterator[Call]:
    """The op's sums alone: an in-place target begins at zero."""
    for layout in LAYOUTS:
        for tokens, accumulator, masked in ((F32, F64, True), (F32, None, False), (BF16, F64, False)):
            how: dict[str, Any] = {"accumulator": accumulator, "masked": masked, "layout": layout}
            yield from_zero(make(op, shape, tokens, factors=F32, bias=True, **how))


def from_zero(call: Call) -> Call:
    if call.target is not None:
        call.target.zero_()
    return call


def limit(op: str) -> float:
    return 2 * LIMIT if op == "ekfac_diagonal_update_" else LIMIT  # of squares


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_the_processor_decides(isa: str) -> None:
    assert float32_products() == ("int16" if isa in ("avx512vnni", "avx512bf16", "amx") else "float32")
    torch.set_float32_matmul_precision("highest")
    assert float32_products() == "float32"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_error_is_that_of_sixteen_bits(isa: str, op: str, shape: dict[str, int | None]) -> None:
    for call in cases(op, shape):
        want, got = call.formula(), call.fresh()()
        assert relative_error(got, want) < LIMIT
        torch.set_num_threads(2)
        assert torch.equal(call.fresh()(), got)
        torch.set_num_threads(1)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize(("T", "O", "I"), ((1, 32, 70), (7, 129, 48), (200, 49, 97)), ids=str)
def test_both_orders_of_gradient_dot(isa: str, T: int, O: int, I: int, per_token: bool) -> None:
    call = make("gradient_dot", {"N": 38, "T": T, "O": O, "I": I, "Q": 5}, bias=True, masked=True, other=per_token)
    want = call.formula()
    for order in ("query_first",) if per_token else ("query_first", "gradient_first"):
        results = []
        for threads in (1, 2):
            out = torch.empty(want.shape)
            _native.gradient_dot(out=out, **call.arguments, order=order, precision="int16", threads=threads)
            results.append(out)
        assert relative_error(results[0], want) < LIMIT and torch.equal(*results)


@pytest.mark.parametrize("op", OPS)
def test_fixed_point_is_what_runs(op: str) -> None:
    """The errors above are not those of float32, where there is fixed point."""
    call = from_zero(make(op, {"N": 5, "T": 128, "I": 129, "O": 49, "Q": 7}, F32))
    error = relative_error(call.fresh()(), call.formula())
    assert (error > 5e-6) is (float32_products() == "int16")


@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e-36), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_what_cannot_be_read_so_is_computed_in_float32(isa: str, op: str, value: float) -> None:
    """In the chunk or block that it is in; what the others got already is not added twice."""
    call = from_zero(make(op, {"N": 40, "T": 64, "I": 70, "O": 33}, F32, accumulator=F64))
    x = call.arguments["x" if "x" in call.arguments else "a"]
    x[37, :, 5] = value
    got = call.fresh()().double()
    torch.set_float32_matmul_precision("highest")
    plainly = call.fresh()().double()
    assert torch.equal(got.isfinite(), plainly.isfinite())
    assert bool(plainly.isfinite().all()) is (value == 1e-36)
    difference, scale = (y.nan_to_num(0, 0, 0).norm() for y in (got - plainly, plainly))
    assert float(difference) <= LIMIT * float(scale)


@pytest.mark.parametrize("scale", (1e-15, 1e-9, 1.0, 1e9), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_sums_stay_in_range(isa: str, op: str, scale: float) -> None:
    """Equal factors of one sign, the largest sums that there are; columns of zeros; features of all sizes."""
    for power in (0, 1, 9):
        call = from_zero(make(op, {"N": 4, "T": 256, "I": 64, "O": 48}, F32, accumulator=F64))
        for name in ("x", "a", "delta"):
            if name in call.arguments:
                x = call.arguments[name]
                x.copy_(x.abs().clamp(max=1.5) ** power).mul_(scale if name != "delta" else 1 / scale)
                x[..., 1::7] = 0
                x.mul_(torch.logspace(0, -6, x.shape[-1]))
        assert relative_error(call.fresh()(), call.formula()) < limit(op)


def test_the_order_is_chosen_by_what_it_costs_in_fixed_point() -> None:
    """Where tokens are rotated at twice the speed, fewer gradients are."""
    N, T, d = 8, 512, 256
    a, delta, U = torch.randn(N, T, d), torch.randn(N, T, d), torch.eye(d)
    call = ops.ekfac_diagonal_update_, torch.zeros(d, d), a, delta, U, U
    found = ihvp.explain(*call).order
    torch.set_float32_matmul_precision("highest")
    assert ihvp.explain(*call).order == "gradient_first"
    assert found == ("project_first" if float32_products_at("high") == "int16" else "gradient_first")


def float32_products_at(precision: str) -> str:
    torch.set_float32_matmul_precision(precision)
    return float32_products()


def test_scores_end_to_end() -> None:
    """Of a net whose layers have whole blocks of positions; the eigenvectors are those of sums in fixed point, too."""
    net = chain(40, 64, 48)
    data = [(torch.randn(6, 130, 40), torch.randn(6, 130, 48)) for _ in range(4)]
    model = ihvp.InfluenceModel(net, squared_error, progress=False)

    def scores(precision: str) -> Tensor:
        torch.set_float32_matmul_precision(precision)
        curvature = ihvp.EKFACIHVP(model, data, damping="auto")
        return ihvp.FirstOrderInfluenceCalculator(model, data, curvature).scores(data[:1])

    assert relative_error(scores("high"), scores("highest").double()) < 1e-3
