"""Identities between ops."""

from __future__ import annotations

import formulas
import ihvp
import pytest
import torch
from op_cases import F32, F64, OPS_ON_ENGINES, SPECS, Call, Engine, make
from tolerance import assert_close
from torch import Tensor

SMALL = {"N": 4, "T": 3, "I": 6, "O": 5, "Q": 3}


def block(call: Call, damping: float) -> Tensor:
    """(U_G (x) U_A) diag(Lambda + damping) (U_G (x) U_A)^T over row-major (O,I')."""
    K = torch.kron(call.arguments["U_G"].double(), call.arguments["U_A"].double())
    return K @ torch.diag(call.arguments["Lambda"].double().flatten() + damping) @ K.mT


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_ekfac_solve_inverts_the_dense_block(engine: Engine, dtype: torch.dtype) -> None:
    dampings = [0.01, 0.3, 10.0]
    call = make("ekfac_solve", SMALL, dtype).replace(damping=dampings)
    vectors = call.arguments["V"].double().flatten(1).mT
    for damping, P in zip(dampings, call(), strict=True):
        P = P.double().flatten(1).mT
        assert_close(P, torch.linalg.solve(block(call, damping), vectors), dtype, 60)
        assert_close(block(call, damping) @ P, vectors, dtype, 60)


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_ekfac_self_influence_is_the_quadratic_form(engine: Engine, dtype: torch.dtype) -> None:
    call = make("ekfac_self_influence", SMALL, dtype, bias=True, masked=True)
    g = formulas.gradients(*(call.arguments[name] for name in ("a", "delta", "mask", "bias"))).double().flatten(1)
    want = (g * torch.linalg.solve(block(call, call.arguments["damping"]), g.mT).mT).sum(1)
    assert_close(call(), want, dtype, 60)


@pytest.mark.parametrize("split", ("pi", "even"))
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_kfac_solves_the_dense_block(engine: Engine, dtype: torch.dtype, split: str) -> None:
    factorize = make("kfac_factorize", SMALL, dtype).replace(damping=0.3, split=split)
    with ihvp.use("reference"):
        L_A, L_G = factorize()
    A, G = factorize.formula()
    call = make("kfac_solve", SMALL, dtype).replace(L_A=L_A, L_G=L_G)
    P = call().double().flatten(1).mT
    vectors = call.arguments["V"].double().flatten(1).mT
    assert_close(P, torch.linalg.solve(torch.kron(G, A), vectors), dtype, 60)
    assert_close(torch.kron(G, A) @ P, vectors, dtype, 60)


def test_rotation_and_back_is_the_identity(engine: Engine) -> None:
    call = make("eigenbasis_rotate", {"I": 50, "O": 9}, F64)
    back = call.replace(V=call(), inverse=True)()
    assert_close(back, call.arguments["V"], F64, call.reduction_length)


@pytest.mark.parametrize("op", ("ekfac_diagonal_update_", "ekfac_self_influence"))
def test_no_basis_is_the_standard_basis(engine: Engine, op: str) -> None:
    for shape in ({"T": 1}, {"T": 130}, {"T": None}):
        call = make(op, {"I": 49, **shape}, bias=True, masked=True)
        identity = call.replace(U_A=torch.eye(50), U_G=torch.eye(3))
        bare = call.replace(U_A=None, U_G=None).fresh()
        bare.check(bare.fresh()(), identity.formula())


@pytest.mark.parametrize(
    ("op", "engine"), [(o, e) for o, e in OPS_ON_ENGINES if any("N" in s for s in SPECS[o].shapes.values())], ids=str
)
def test_one_batch_of_64_is_eight_of_8(op: str, engine: Engine) -> None:
    spec = SPECS[op]
    whole = make(op, {"N": 64, "T": 3}, bias=True, masked=True).fresh()
    letters = {**spec.shapes, **spec.masks}
    with engine.running():
        parts, running = [], whole.fresh()
        for i in range(0, 64, 8):
            pieces = {name: x[i : i + 8] for name, x in whole.arguments.items() if letters.get(name, "")[:1] == "N"}
            parts.append(running.replace(**pieces)())
        together = whole()
    split = parts[-1] if spec.example_axis is None else torch.cat(parts, spec.example_axis)
    assert_close(split, together.double(), F32, whole.reduction_length)
