"""Every contraction order of an op has the values of its formula."""

from __future__ import annotations

import pytest
import torch
from ihvp import _native
from ihvp.ops import _registry
from op_cases import BF16, F16, F32, F64, LAYOUTS, SPECS, make, run

ORDERS = {
    "ekfac_diagonal_update": ("ekfac_diagonal_update_", "project_first", "gradient_first"),
    "gradient_dot": ("gradient_dot", "query_first", "gradient_first"),
}


ORDERED_SHAPES = (
    {"T": 1},
    {"N": 3, "T": 1025, "I": 6, "O": 9},
    {"N": 2, "T": 2500, "I": 6, "O": 5},
    {"N": 67, "T": 9, "I": 65, "O": 33, "Q": 6},
    {"N": 67, "T": 2, "I": 7, "O": 6, "Q": 1},
    {"N": 100, "T": 9, "I": 65, "O": 33, "Q": 2},
    {"N": 3, "T": 3, "I": 7, "O": 66},
    {"N": 8, "T": 5, "I": 97, "O": 31, "Q": 9},
)


@pytest.mark.parametrize("shape", ORDERED_SHAPES, ids=str)
@pytest.mark.parametrize(("kernel", "order"), [(k, order) for k, (_, *orders) in ORDERS.items() for order in orders])
def test_contraction_orders(isa: str, kernel: str, order: str, shape: dict[str, int | None]) -> None:
    op = ORDERS[kernel][0]
    for dtype, accumulator, layout in ((F32, F64, "strided"), (F32, None, "contiguous"), (F64, None, "transposed")):
        call = make(op, shape, dtype, accumulator=accumulator, bias=True, masked=True, layout=layout)
        want, results = call.formula(), []
        for threads in (1, 2) if layout == "contiguous" else (1,):
            arguments = dict(call.fresh().arguments)
            if call.target is None:
                arguments["out"] = torch.empty(want.shape, dtype=dtype)
            getattr(_native, kernel)(**arguments, order=order, precision="float32", threads=threads)
            results.append(arguments[SPECS[op].target or "out"])
        call.check(results[0], want)
        assert torch.equal(results[0], results[-1])


@pytest.mark.parametrize("tokens", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("T", [1, 2, 7, 9, 40])
def test_blocks_of_gradients_of_every_shape(isa: str, T: int, tokens: torch.dtype) -> None:
    """More than one chunk of examples; Q and T decide between blocks of 48 x 768, 96 x 384 and 192 x 192."""
    for Q in (2, 20):
        shape = {"N": 38, "T": T, "I": 385, "O": 391, "Q": Q}
        call = make("gradient_dot", shape, tokens, factors=F64 if tokens == F64 else F32, bias=True, masked=True)
        want = call.formula()
        out = torch.empty(want.shape, dtype=call.dtype)
        for threads in (1, 2):
            _native.gradient_dot(
                **call.arguments, out=out, order="gradient_first", precision="float32", threads=threads
            )
            call.check(out, want)


COMPOSED = {
    "ghost_dot": ("ghost", "gradient_first"),
    "ghost_norm": ("ghost", "gradient_first"),
    "gradient_dot": ("low_rank",),
    "gradient_dot_low_rank": ("low_rank", "dense"),
}


@pytest.mark.parametrize("shape", (*ORDERED_SHAPES, {"N": 2, "T": 400, "I": 20, "O": 9, "M": 3}), ids=str)
@pytest.mark.parametrize(("op", "order"), [(op, order) for op, orders in COMPOSED.items() for order in orders])
def test_orders_of_composed_ops(
    isa: str, op: str, order: str, shape: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = _registry.Op.best
    monkeypatch.setattr(_registry.Op, "best", lambda self, *given: order if self.name == op else chosen(self, *given))
    for dtype, layout in ((F32, "contiguous"), (F64, "transposed"), (BF16, "strided")):
        run(make(op, shape, dtype, bias=True, masked=True, layout=layout))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shape", ({"T": 1}, {"N": 9, "T": 50, "O": 250, "I": 300, "Q": 3}), ids=str)
def test_dots_through_a_unit_matrix_have_the_same_bits_for_any_threads(
    shape: dict[str, int], per_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_registry.Op, "best", lambda self, *given: "low_rank")
    call = make("gradient_dot", shape, masked=True).replace(per_token=per_token)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call())
        call.check(results[-1])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_ghost_dot_of_large_layers(isa: str, layout: str) -> None:
    """Layers large enough for tile registers: more examples than a chunk, either side the longer one."""
    for dims, dtype, factors in (
        ({"N": 2060, "M": 2, "I": 64, "O": 64}, F32, F32),
        ({"N": 33, "M": 3, "I": 31, "O": 140}, BF16, F32),
        ({"N": 31, "M": 1, "I": 270, "O": 17}, F16, F16),
    ):
        run(make("weighted_ghost_dot", dims, dtype, factors=factors, bias=True, masked=True, layout=layout))
