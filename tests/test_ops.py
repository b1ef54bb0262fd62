"""Every op, on every implementation and instruction set present, against its float64 formula."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from grouped_cases import GROUPED
from hypothesis import given
from hypothesis import strategies as st
from ihvp import ops
from op_cases import BF16, DTYPES, F16, F32, F64, LAYOUTS, OPS_ON_ENGINES, SPECS, Call, Engine, make, run
from tolerance import assert_close, tol

# Odd sizes, both sides of the widths of a register tile (4, 8) and of a panel (8, 24, 48), chunks (1024, 2048
# positions), and nothing at all. T = None: two-dimensional tokens.
CASES: dict[str, tuple[dict[str, int | None], dict[str, Any]]] = {
    "one of each": ({"N": 1, "M": 1, "T": 1, "S": 1, "I": 1, "O": 1, "Q": 1, "R": 1}, {}),
    "flat": ({"T": None}, {"bias": True}),
    "flat masked": ({"T": None, "N": 9}, {"masked": True, "dtype": F64}),
    "one position": ({"T": 1, "S": 1, "N": 49, "I": 48, "O": 8}, {"other": True, "layout": "strided"}),
    "positions": ({"T": 6, "N": 7, "I": 49, "O": 7}, {"bias": True, "masked": True, "other": True}),
    "panel less one": ({"I": 47, "O": 23, "Q": 7}, {"bias": True, "dtype": F64, "layout": "transposed"}),
    "panel and one": ({"I": 49, "O": 25, "M": 9}, {"masked": True, "dtype": F16}),
    "two panels": ({"N": 50, "T": None, "M": 8, "I": 97, "O": 49}, {"bias": True, "masked": True}),
    "short rows": ({"N": 24, "T": 4, "I": 47, "O": 33}, {}),
    "large": ({"N": 9, "T": 5, "I": 130, "O": 97, "Q": 9}, {"bias": True, "masked": True}),
    "large flat": ({"N": 97, "T": None, "I": 97, "O": 130, "M": 7}, {"dtype": F64, "other": True}),
    "few positions": ({"N": 13, "T": 3, "I": 200, "O": 150}, {"bias": True, "masked": True, "layout": "transposed"}),
    "few flat": ({"N": 70, "T": None, "I": 145, "O": 200}, {"bias": True, "layout": "strided"}),
    "bfloat16": ({"I": 33, "O": 9}, {"bias": True, "masked": True, "dtype": BF16, "layout": "transposed"}),
    "bfloat16 tokens": ({"T": None}, {"dtype": BF16, "factors": F32, "accumulator": F64, "other": True}),
    "float16 tokens": ({"T": 7, "I": 9}, {"dtype": F16, "factors": F64, "masked": True, "bias": True}),
    "wide accumulator": ({"N": 130}, {"accumulator": F64, "bias": True, "layout": "strided"}),
    "expanded": ({"N": 7, "Q": 5}, {"layout": "expanded", "bias": True, "masked": True}),
    "many examples": ({"N": 2600, "T": None, "I": 9}, {"bias": True, "masked": True, "accumulator": F64}),
    "blocks of examples": ({"N": 700, "T": 3, "I": 9, "Q": 5}, {"bias": True, "masked": True}),
    "many positions": ({"N": 3, "T": 1100, "I": 9, "Q": 5}, {"bias": True, "masked": True}),
    "very many positions": ({"N": 2, "T": 2100, "I": 9}, {"dtype": F64}),
    "no examples": ({"N": 0}, {"bias": True, "masked": True}),
    "no other examples": ({"M": 0}, {"bias": True}),
    "no positions": ({"T": 0}, {"masked": True}),
    "no queries": ({"Q": 0}, {"other": True}),
    "no inputs": ({"I": 0}, {}),
    "bias alone": ({"I": 0}, {"bias": True}),
    "no outputs": ({"O": 0}, {}),
}


EMPTY_FACTORS = ("no inputs", "bias alone", "no outputs")  # refused by kfac_factorize


def random_call(op: str, **fixed: Any) -> st.SearchStrategy[Call]:
    extent = st.integers(0, 60) | st.integers(61, 130)
    dims = st.fixed_dictionaries(
        {letter: extent for letter in "IO"}
        | {letter: st.integers(0, 20) for letter in "NMQ"}
        | {"T": st.one_of(st.none(), st.integers(0, 9)), "S": st.integers(0, 5), "R": st.integers(0, 5)}
    )
    if op == "kfac_factorize":
        dims = dims.filter(lambda d: d["I"] and d["O"])
    return st.builds(
        make,
        st.just(op),
        dims,
        st.sampled_from(DTYPES),
        factors=st.sampled_from(DTYPES),
        accumulator=st.sampled_from((None, F64)),
        bias=st.booleans(),
        masked=st.booleans(),
        other=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 99),
    )


def test_tolerance_is_as_tight_as_promised() -> None:
    assert tol(F32, 64) < 1e-5 and tol(F64, 64) < 1e-11
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1.0 + 1e-5]), torch.ones(1, dtype=F64), F32, 64)
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([torch.nan]), torch.ones(1, dtype=F64), F32, 64)


def test_every_op_is_listed() -> None:
    assert sorted((*SPECS, *GROUPED)) == sorted(ops.__all__)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("op", "engine"), OPS_ON_ENGINES, ids=str)
def test_formula(op: str, engine: Engine, case: str) -> None:
    dims, how = CASES[case]
    if op == "kfac_factorize" and case in EMPTY_FACTORS:
        dims = {}
    with engine.running():
        run(make(op, dims, **how))


@pytest.mark.parametrize(("op", "engine"), OPS_ON_ENGINES, ids=str)
def test_formula_at_any_shape(op: str, engine: Engine) -> None:
    @given(random_call(op))
    def check(call: Call) -> None:
        with engine.running():
            run(call)

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("op", "engine"), OPS_ON_ENGINES, ids=str)
def test_formula_in_any_memory(op: str, engine: Engine, layout: str) -> None:
    dims = {"N": 3, "I": 10, "O": 9}
    with engine.running():
        for dtype, factors in itertools.product(DTYPES, DTYPES):
            run(make(op, dims, dtype, factors=factors, bias=True, masked=True, layout=layout))


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_every_half_precision_number_is_widened_exactly(engine: Engine, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for stride in (1, 2):
        one_by_one = ops.eigenbasis_project(x[::stride, None], torch.ones(1, 1))[:, 0]
        assert torch.equal(one_by_one.nan_to_num(7.0), x[::stride].float().nan_to_num(7.0))
        assert torch.equal(one_by_one.isnan(), x[::stride].isnan())


def test_rows_wherever_they_lie(engine: Engine) -> None:
    """Tokens of short rows are read from where they are: next to each other, evenly spaced, or neither."""
    buffer, U = torch.randn(40, 12, 50), torch.randn(33, 33)
    rows = buffer.flatten(0, 1)
    for x in (rows[:, None, :33], rows[::3, None, 7:40], buffer[:, 2:3, :33], buffer[:, :8, :33], buffer[::5, :, 17:]):
        assert_close(ops.eigenbasis_project(x, U), x.double() @ U.double(), F32, 33)
