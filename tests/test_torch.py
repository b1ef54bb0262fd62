"""Ops in torch: schema, compile, fake tensors, transforms, views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from ihvp import ops
from op_cases import F16, F32, F64, SPECS, Call, Engine, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def raw(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """The operator behind the function, with its positional arguments: tokens in three dimensions, all given."""
    overload = getattr(torch.ops.ihvp, call.op).default
    given = call.fresh().arguments
    return overload, tuple(given.get(argument.name) for argument in overload._schema.arguments)


@pytest.mark.parametrize("op", SPECS)
def test_opcheck(op: str) -> None:
    call = make(op, {"T": 3}, bias=True, masked=True, other=op == "ekfac_solve")
    torch.library.opcheck(*raw(call))


@pytest.mark.parametrize("op", SPECS)
def test_fake_tensors_have_the_shapes_and_types_of_results(op: str) -> None:
    calls = [
        make(op, shape, dtype, factors=F32, bias=bias, masked=True, other=other)
        for shape in ({"T": 3}, {"T": None})
        for dtype, bias, other in ((F32, False, False), (F16, True, True), (F64, True, False))
    ]
    for call in calls:
        real = call.fresh()()
        with FakeTensorMode() as mode:
            faked = {name: mode.from_tensor(x) if isinstance(x, Tensor) else x for name, x in call.arguments.items()}
            fake = call.replace(**faked)()
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for expected, got in pairs:
            assert isinstance(got, FakeTensor)
            assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
            assert got.stride() == expected.stride()


def test_compile_of_a_whole_graph() -> None:
    call = make("gradient_dot", {"T": 3}, bias=True, masked=True)
    P, a, delta, mask = (call.arguments[name] for name in ("P", "a", "delta", "mask"))

    def scores(C: Tensor, P: Tensor, a: Tensor, delta: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        C = ops.covariance_update_(C, a * 2, mask=mask, bias=True)
        preconditioned = ops.ekfac_solve(P, C, torch.eye(3), C[:3].square(), [0.1, 1.0]).sum(0)
        return C + 1, ops.gradient_dot(preconditioned, a, delta, mask=mask, bias=True).relu()

    eager_C, compiled_C = torch.eye(8), torch.eye(8)
    eager = scores(eager_C, P, a, delta, mask)
    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")(compiled_C, P, a, delta, mask)
    assert torch.equal(eager_C, compiled_C)
    assert all(torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, on import
def test_derivatives_are_refused_not_zero() -> None:
    call = make("gradient_dot", {})
    a = call.arguments["a"]
    with pytest.raises(RuntimeError, match=r"^a requires grad"):
        torch.func.grad(lambda x: call.replace(a=x)().sum())(a)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: call.replace(a=x)(), (a,), (a,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        call.replace(a=forward_ad.make_dual(a, torch.ones_like(a)))()


def test_negated_views_are_read_as_they_appear(engine: Engine) -> None:
    """The imaginary part of a conjugate is a view with a negative bit: the sign is not in the memory."""
    x = torch.complex(torch.zeros(4, 3), torch.arange(12.0).view(4, 3)).conj().imag
    assert x.is_neg()
    C = ops.covariance_update_(torch.zeros(4, 4), x, bias=True)
    assert torch.equal(C, ops.covariance_update_(torch.zeros(4, 4), x.resolve_neg(), bias=True))


def test_negated_targets_and_nested_tensors_are_refused() -> None:
    negated = torch.zeros(4, 4, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"^C must own its memory, got a negated view"):
        ops.covariance_update_(negated, torch.ones(3, 4))
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^a must be a dense tensor, got"):
        ops.ghost_norm(nested, torch.ones(2, 3))
