"""`use` forces an implementation, `explain` tells which would run and why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ihvp
import pytest
import torch
from ihvp import ops
from ihvp.ops import _registry
from op_cases import F64, NATIVE_OPS, SPECS, make
from torch import Tensor


def test_use_survives_threads_that_leave_out_of_order() -> None:
    first, second = ihvp.use("reference"), ihvp.use("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    call = make("gradient_dot", {})
    assert ihvp.explain(ops.gradient_dot, **call.arguments).reason == "forced by ihvp.use"
    assert ihvp.explain(ops.gradient_dot, **call.arguments).implementation == "native"
    second.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("op", "wish"),
    [(op, wish) for op in SPECS for wish in ("native", "triton", "cuda") if wish != "native" or op not in NATIVE_OPS],
)
def test_an_impossible_wish_is_refused(op: str, wish: str) -> None:
    call = make(op, {}).fresh()
    with ihvp.use(wish), pytest.raises(RuntimeError, match=f'{op} has no "{wish}" implementation for cpu'):
        call()
    call.check(call.fresh()())


def implementation() -> str:
    return ihvp.explain(ops.gradient_dot, *list(make("gradient_dot", {}).arguments.values())[:3]).implementation


def test_use_nests_and_ends_with_its_context() -> None:
    assert implementation() == "native"
    with pytest.raises(ZeroDivisionError), ihvp.use("reference"):
        assert implementation() == "reference"
        with ihvp.use("native"):
            assert implementation() == "native"
        assert implementation() == "reference"
        raise ZeroDivisionError
    assert implementation() == "native"
    with pytest.raises(ValueError, match="implementation must be one of reference, native, triton, cuda, got 'cud'"):
        with ihvp.use("cud"):
            pass


@pytest.mark.parametrize("op", SPECS)
def test_explain_computes_nothing(op: str) -> None:
    call = make(op, {"T": 130, "I": 9, "O": 7}, bias=True, masked=True).fresh()
    before = None if call.target is None else call.target.clone()
    explanation = ihvp.explain(getattr(ops, op), **call.arguments)
    assert call.target is None or torch.equal(call.target, before)
    assert explanation.op == op and op in str(explanation)
    assert explanation.implementation == ("native" if op in NATIVE_OPS else "reference")
    assert len(explanation.candidates) == len(explanation.seconds)
    with ihvp.use("reference"):
        assert ihvp.explain(getattr(ops, op), **call.arguments).implementation == "reference"


@pytest.mark.parametrize("shape", ({"T": 1}, {"T": 130, "Q": 200}, {"T": 130, "Q": 1}, {"N": 0}, {"T": 0}), ids=str)
@pytest.mark.parametrize("op", ("ekfac_diagonal_update_", "gradient_dot"))
def test_explain_chooses_the_cheapest_order(op: str, shape: dict[str, int]) -> None:
    explanation = ihvp.explain(getattr(ops, op), **make(op, {"I": 9, "O": 7, **shape}).arguments)
    orders = [candidate.order for candidate in explanation.candidates]
    assert orders and explanation.order == orders[explanation.seconds.index(min(explanation.seconds))]
    assert f"-> {explanation.order} " in str(explanation)


def test_explain_knows_when_each_order_pays() -> None:
    for op, short, long in (
        ("ekfac_diagonal_update_", "project_first", "gradient_first"),
        ("gradient_dot", "query_first", "gradient_first"),
    ):
        for T, order in ((2, short), (300, long)):
            call = make(op, {"N": 64, "T": T, "I": 96, "O": 96, "Q": 4})
            assert ihvp.explain(getattr(ops, op), **call.arguments).order == order
    for few, per_token in (("O", False), ("I", False), ("O", True)):
        call = make("gradient_dot", {"N": 256, "T": 1, "I": 512, "O": 512, "Q": 64, few: 10})
        assert ihvp.explain(ops.gradient_dot, **call.replace(per_token=per_token).arguments).order == "low_rank"


def test_an_order_is_predicted_once_for_all_that_its_cost_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    op, predicted, costs = _registry._ops["gradient_dot"], [], _registry.Op._costs

    def counted(self: _registry.Op, *args: Any) -> Any:
        predicted.append(self.name)
        return costs(self, *args)

    monkeypatch.setattr(_registry.Op, "_costs", counted)
    monkeypatch.setattr(_registry, "REMEMBERED", 3)
    op._best.clear()
    first = make("gradient_dot", {"T": 3})
    others = [make("gradient_dot", {"T": 4}), make("gradient_dot", {"T": 3}, F64)]
    for call in (first, *others, *others, first):
        call.check(call())
    assert len(predicted) == 3
    torch.set_num_threads(2)
    first.check(first())
    assert len(predicted) == 4 and len(op._best) == 1, "threads count, and no more than REMEMBERED are kept"


def test_explain_refuses_what_the_op_refuses() -> None:
    with pytest.raises(TypeError, match=r"op must be a function of ihvp\.ops"):
        ihvp.explain(torch.zeros, 1)
    call = make("gradient_dot", {})
    with pytest.raises(ValueError, match=r"^P must be"):
        ihvp.explain(ops.gradient_dot, **call.replace(P=torch.ones(2, 2)).arguments)
    assert call() is not None


def test_explain_leaves_other_threads_alone() -> None:
    other, call = make("ghost_norm", {}), make("gradient_dot", {})

    def gradient_dot(**arguments: Any) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            other.check(pool.submit(other).result())
        return ops.gradient_dot(**arguments)

    assert ihvp.explain(gradient_dot, **call.arguments).op == "gradient_dot"
