"""torch's float32 matmul precisions: weighted_ghost_dot at each, and those set for single backends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from ihvp import _native, ops
from torch import Tensor


def tokens_and_weight(noise: float, O: int = 97, I: int = 131, N: int = 70) -> tuple[dict[str, Tensor], Tensor]:
    """64 and N examples of one position, a weight 1 / (Lambda + damping), and the float64 result."""
    torch.manual_seed(0)
    eigenvalues = torch.outer(*(torch.logspace(0, -4, d) for d in (O, I)))
    weight = 1 / (eigenvalues * (1 + noise * torch.randn(O, I)).abs() + 0.01)
    given = {name: torch.randn(64 if "1" in name else N, I if name[0] == "a" else O) for name in TOKENS}
    return {**given, "weight": weight}, exact(**given, weight=weight)


def exact(a1: Tensor, delta1: Tensor, a2: Tensor, delta2: Tensor, weight: Tensor) -> Tensor:
    a1, delta1, a2, delta2, weight = (x.double() for x in (a1, delta1, a2, delta2, weight))
    return torch.stack([((delta2 * d) @ weight * (a2 * x)).sum(1) for x, d in zip(a1, delta1, strict=True)])


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def by_kernel(given: dict[str, Tensor], precision: str, threads: int = 1) -> Tensor:
    tokens = {name: x.unsqueeze(1) if name in TOKENS else x for name, x in given.items()}
    out = torch.empty(given["a1"].shape[0], given["a2"].shape[0])
    _native.weighted_ghost_dot(out, **tokens, mask1=None, mask2=None, bias=False, precision=precision, threads=threads)
    return out


TOKENS = ("a1", "delta1", "a2", "delta2")


@pytest.mark.parametrize("noise", (0.0, 0.05, 5.0), ids="noise={}".format)
@pytest.mark.parametrize(("precision", "limit"), (("highest", 1e-6), ("high", 5e-4), ("medium", 1e-2)))
def test_weighted_ghost_dot_at_torchs_precisions(isa: str, precision: str, limit: float, noise: float) -> None:
    """Narrower products, where they are faster, take the residual of a smooth weight; float32 takes a rough one."""
    given, want = tokens_and_weight(noise)
    torch.set_float32_matmul_precision(precision)
    got = ops.weighted_ghost_dot(**given)
    given["weight"] *= 2  # a weight that changed in place is split anew
    twice = ops.weighted_ghost_dot(**given)
    assert relative_error(got, want) < limit
    assert relative_error(twice, 2 * want) < 2 * limit


@pytest.mark.parametrize(("precision", "limit"), (("float32", 1e-6), ("bf16x3", 1e-5), ("bf16", 1e-2)))
def test_products_of_bfloat16_pieces(isa: str, precision: str, limit: float) -> None:
    given, want = tokens_and_weight(5.0)
    assert relative_error(by_kernel(given, precision), want) < limit


FIXED_POINT = pytest.mark.parametrize("fixed", ("int8x3", "int16"))


@FIXED_POINT
@pytest.mark.parametrize(
    ("O", "I", "N"), ((1, 1, 1), (7, 130, 33), (130, 7, 31), (97, 131, 70), (65, 650, 2100), (600, 1300, 33))
)
def test_products_in_fixed_point(isa: str, O: int, I: int, N: int, fixed: str) -> None:
    """Odd sizes, more k than a block and more examples than a chunk have, a weight larger than an L2 cache."""
    given, want = tokens_and_weight(0.05, O, I, N)
    got = by_kernel(given, fixed)
    assert relative_error(got, want) < 2e-4  # the tolerance of int8x3, twice the error of int16
    assert torch.equal(by_kernel(given, fixed, threads=2), got)


def test_eight_bit_pieces_are_left_where_few_numbers_rule(isa: str) -> None:
    """Large numbers among small ones take the range of the eight bits; bfloat16 pieces bear them."""
    given, _ = tokens_and_weight(0.05, 600, 620)
    assert torch.equal(by_kernel(given, "int8x3"), by_kernel(given, "bf16x3")) is (isa != "amx")
    given.update({name: given[name] ** 9 for name in ("a1", "delta1")}, weight=1 / given["weight"])
    assert torch.equal(by_kernel(given, "int8x3"), by_kernel(given, "bf16x3"))
    assert relative_error(by_kernel(given, "int8x3"), exact(**given)) < 5e-5  # what kernels.h states of bf16x3


@FIXED_POINT
@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e25, 1e-18, 1e-33), ids=str)
def test_numbers_out_of_the_range_of_fixed_point(isa: str, value: float, fixed: str) -> None:
    """They stay where they are: in the row of their example."""
    given, want = tokens_and_weight(0.05)
    given["a2"][17] *= 0
    given["a2"][17, 3] = value
    got = by_kernel(given, fixed)
    others = torch.arange(70) != 17
    assert relative_error(got[:, others], want[:, others]) < 2e-4
    exactly = exact(**given)[:, 17]
    if abs(value) < 1e30:
        assert relative_error(got[:, 17], exactly) < 2e-4
    else:
        assert not got[:, 17].isfinite().any()


@pytest.mark.parametrize("power", (1, 9, 40))
def test_sums_of_sixteen_bit_integers_stay_in_range(isa: str, power: int) -> None:
    """Equal factors of one sign, the largest sums that there are, and factors that few numbers rule."""
    given, _ = tokens_and_weight(0.05, 160, 1500)
    given = {name: x.abs().clamp(max=1.5) ** power for name, x in given.items()}
    assert relative_error(by_kernel(given, "int16"), exact(**given)) < 2e-4
    given = {name: torch.full_like(x, 1.0) for name, x in given.items()}
    assert relative_error(by_kernel(given, "int16"), exact(**given)) < 2e-4


@pytest.mark.parametrize("zero", (False, True))
def test_large_layers_in_fixed_point(isa: str, zero: bool) -> None:
    given, _ = tokens_and_weight(0.05, 300, 321)
    for name in TOKENS:  # as projected tokens are: some directions matter, and some examples
        given[name] *= torch.logspace(0, -3, given[name].shape[1])
        given[name] *= torch.logspace(0, -6, len(given[name])).unsqueeze(1)
        given[name][:, 10] = 0
        given[name] *= 0 if zero else 1
    want = exact(**given)
    got = ops.weighted_ghost_dot(**given).double()
    assert float((got - want).norm()) <= 1e-5 * float(want.norm())
    # Small examples have units of their own: against its own terms, no score is off by more than some deviations.
    terms = exact(**{name: x.double().square() for name, x in given.items()}).sqrt()
    assert zero or float(((got - want) / terms).abs().max()) < 3e-4


def test_one_bad_example_of_a_large_layer(isa: str) -> None:
    given, want = tokens_and_weight(0.05, 300, 321)
    given["a2"][17, 3] = float("nan")
    got = ops.weighted_ghost_dot(**given)
    others = torch.arange(70) != 17
    assert bool(got[:, 17].isnan().all())
    assert relative_error(got[:, others], want[:, others]) < 1e-5


def test_equal_terms_whose_errors_add_up(isa: str) -> None:
    """Equal factors round alike, so that their errors add up instead of averaging out."""
    ones, a2 = torch.ones(4, 512), torch.full((4, 512), 1.0039291381835938)
    weight = torch.full((512, 512), 1.0194169282913208)
    want = 512 * 512 * float(a2[0, 0].double() * weight[0, 0].double())
    assert ops.weighted_ghost_dot(ones, ones, a2, ones, weight).sub(want).abs().max() / want < 1e-5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_weight_of_fewer_bits(isa: str, dtype: torch.dtype) -> None:
    """It is widened before it is split."""
    given, _ = tokens_and_weight(0.05, 300, 321)
    given["weight"] = given["weight"].to(dtype)
    assert relative_error(ops.weighted_ghost_dot(**given), exact(**given)) < 1e-5


PER_BACKEND = """
import ihvp, torch
from ihvp import ops
from ihvp.ops import _registry
from ihvp.ops._precision import cpu_precision, float32_products

torch.backends.{backend}.matmul.fp32_precision = {value!r}
assert cpu_precision() == {expected!r}, cpu_precision()
d = [torch.randn(9, 40) for _ in range(4)]
ops.covariance_update_(torch.zeros(40, 40), d[0])
ops.weighted_ghost_dot(d[0], d[1], d[2], d[3], torch.rand(40, 40))
lacks = _registry._ops["ghost_norm"]._lacks("triton", (d[0][:, None], d[1][:, None], None, False))
assert lacks == "float32 precisions that torch.backends sets apart", lacks
"""


@pytest.mark.parametrize(
    ("backend", "value", "expected"),
    [("mkldnn", "tf32", "high"), ("mkldnn", "bf16", "medium"), ("cuda", "tf32", "highest")],
)
def test_precisions_of_single_backends(backend: str, value: str, expected: str) -> None:
    """torch refuses to name a common one then; ops on the CPU go by theirs, those on GPUs run by the reference."""
    script = PER_BACKEND.format(backend=backend, value=value, expected=expected)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
