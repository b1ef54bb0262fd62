"""Every op, on every implementation and instruction set present, against its float64 formula."""

from __future__ import annotations

import itertools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import formulas
import ihvp
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from grouped_cases import GROUPED
from hypothesis import given
from hypothesis import strategies as st
from ihvp import _native, ops
from ihvp.ops import _registry
from op_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NATIVE_OPS,
    OPS_ON_ENGINES,
    SPECS,
    Call,
    Engine,
    make,
)
from tolerance import assert_close, tol
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

LAYOUTS = ("contiguous", "transposed", "strided", "expanded")

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
    "large": ({"N": 9, "T": 5, "I": 130, "O": 97, "Q": 9}, {"bias": True, "masked": True}),
    "large flat": ({"N": 97, "T": None, "I": 97, "O": 130, "M": 7}, {"dtype": F64, "other": True}),
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


def run(call: Call) -> None:
    """The values of the formula, operands untouched, and an in-place op returns its target."""
    call, want = call.fresh(), call.formula()
    operands = {name: x.clone() for name, x in call.arguments.items() if isinstance(x, Tensor) and x is not call.target}
    result = call()
    call.check(result, want)
    assert call.target is None or result is call.target
    for name, before in operands.items():
        assert torch.equal(call.arguments[name].nan_to_num(), before.nan_to_num()), f"{name} changed"


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


def native_call(op: str) -> Call:
    """Several panels, several positions, more than one chunk of examples."""
    return make(op, {"N": 530, "T": 4, "I": 90, "O": 50, "Q": 40}, bias=True, masked=True)


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


# --- contraction orders ----------------------------------------------------------------------------------------

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
            getattr(_native, kernel)(**arguments, order=order, threads=threads)
            results.append(arguments[SPECS[op].target or "out"])
        call.check(results[0], want)
        assert torch.equal(results[0], results[-1])


COMPOSED = {
    "ghost_dot": ("ghost", "gradient_first"),
    "ghost_norm": ("ghost", "gradient_first"),
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_ghost_dot_of_large_layers(isa: str, layout: str) -> None:
    """Layers large enough for tile registers: more examples than a chunk, either side the longer one."""
    for dims, dtype, factors in (
        ({"N": 2060, "M": 2, "I": 64, "O": 64}, F32, F32),
        ({"N": 33, "M": 3, "I": 31, "O": 140}, BF16, F32),
        ({"N": 31, "M": 1, "I": 270, "O": 17}, F16, F16),
    ):
        run(make("weighted_ghost_dot", dims, dtype, factors=factors, bias=True, masked=True, layout=layout))


# --- identities ------------------------------------------------------------------------------------------------

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


# --- determinism, threads and processes ------------------------------------------------------------------------


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_same_bits_in_every_run_and_for_any_threads(isa: str, op: str) -> None:
    call, results = native_call(op), []
    for threads in (1, *(2, 3) * 3):  # several times: threads in each other's way need luck to meet
        torch.set_num_threads(threads)
        results.append(call.fresh()())
    call.check(results[0])
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_calls_from_several_threads() -> None:
    calls = [native_call(op) for op in NATIVE_OPS]
    alone = [call.fresh()() for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(lambda call: call.fresh()(), calls))
            assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True))


FORK = """
import faulthandler, os, torch
from op_cases import NATIVE_OPS, make

faulthandler.dump_traceback_later(300, exit=True)  # a hang becomes a failure with a traceback
calls = [make(op, {"N": 300, "I": 90, "O": 50}) for op in NATIVE_OPS]
torch.set_num_threads(2)
before = [call.fresh()() for call in calls]
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    same = all(torch.equal(call.fresh()(), x) for call, x in zip(calls, before))
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(torch.equal(call.fresh()(), x) for call, x in zip(calls, before))
"""


def test_calls_in_a_forked_child() -> None:
    child = subprocess.run([sys.executable, "-c", FORK], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


# --- torch: schema, compile, fake tensors, transforms ------------------------------------------------------------


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


def tokens_and_weight(noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """64 and 70 examples of one position, a weight 1 / (Lambda + damping), and the float64 result."""
    torch.manual_seed(0)
    eigenvalues = torch.outer(*(torch.logspace(0, -4, d) for d in (97, 131)))
    weight = 1 / (eigenvalues * (1 + noise * torch.randn(97, 131)).abs() + 0.01)
    given = {name: torch.randn(64 if "1" in name else 70, 131 if name[0] == "a" else 97) for name in TOKENS}
    g1, g2 = (given[f"delta{i}"].double().unsqueeze(2) * given[f"a{i}"].double().unsqueeze(1) for i in (1, 2))
    return {**given, "weight": weight}, torch.einsum("moi,noi,oi->mn", g1, g2, weight.double())


TOKENS = ("a1", "delta1", "a2", "delta2")


@pytest.mark.parametrize("noise", (0.0, 0.05, 5.0), ids="noise={}".format)
@pytest.mark.parametrize(("precision", "limit"), (("highest", 1e-6), ("high", 5e-4), ("medium", 1e-2)))
def test_weighted_ghost_dot_at_torchs_precisions(isa: str, precision: str, limit: float, noise: float) -> None:
    """With AMX the residual of a smooth weight goes through bfloat16 products, and a rough weight through float32."""
    given, want = tokens_and_weight(noise)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = ops.weighted_ghost_dot(**given)
        given["weight"] *= 2  # a weight that changed in place is split anew
        twice = ops.weighted_ghost_dot(**given)
    finally:
        torch.set_float32_matmul_precision(before)
    assert float((got.double() - want).norm() / want.norm()) < limit
    assert float((twice.double() - 2 * want).norm() / want.norm()) < 2 * limit


@pytest.mark.parametrize(("precision", "limit"), (("float32", 1e-6), ("bf16x3", 1e-5), ("bf16", 1e-2)))
def test_products_of_bfloat16_pieces(isa: str, precision: str, limit: float) -> None:
    given, want = tokens_and_weight(5.0)
    tokens = {name: x.unsqueeze(1) if name in TOKENS else x for name, x in given.items()}
    out = torch.empty(64, 70)
    _native.weighted_ghost_dot(out, **tokens, mask1=None, mask2=None, bias=False, precision=precision, threads=1)
    assert float((out.double() - want).norm() / want.norm()) < limit


def test_equal_terms_whose_errors_add_up(isa: str) -> None:
    """Equal factors round alike, so that their errors add up instead of averaging out."""
    ones, a2 = torch.ones(4, 512), torch.full((4, 512), 1.0039291381835938)
    weight = torch.full((512, 512), 1.0194169282913208)
    want = 512 * 512 * float(a2[0, 0].double() * weight[0, 0].double())
    assert ops.weighted_ghost_dot(ones, ones, a2, ones, weight).sub(want).abs().max() / want < 1e-5


def test_negated_targets_and_nested_tensors_are_refused() -> None:
    negated = torch.zeros(4, 4, dtype=torch.complex64).conj().imag
    with pytest.raises(ValueError, match=r"^C must own its memory, got a negated view"):
        ops.covariance_update_(negated, torch.ones(3, 4))
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"^a must be a dense tensor, got"):
        ops.ghost_norm(nested, torch.ones(2, 3))


def test_use_survives_threads_that_leave_out_of_order() -> None:
    first, second = ihvp.use("reference"), ihvp.use("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    call = make("gradient_dot", {})
    assert ihvp.explain(ops.gradient_dot, **call.arguments).reason == "forced by ihvp.use"
    assert ihvp.explain(ops.gradient_dot, **call.arguments).implementation == "native"
    second.__exit__(None, None, None)


# --- use and explain -------------------------------------------------------------------------------------------


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
            call = make(op, {"N": 64, "T": T, "I": 96, "O": 96, "Q": 2})
            assert ihvp.explain(getattr(ops, op), **call.arguments).order == order


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
