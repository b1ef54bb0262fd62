"""The ops as data: the shapes of their arguments, what may vary, where they run; and how to make and check a call."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import formulas
import ihvp
import torch
from ihvp import _native, ops
from ihvp.ops._registry import DEVICES, implementations
from tolerance import assert_close
from torch import Tensor

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")

# N, M examples; T, S positions; I, O features; J = I', with the bias feature; Q queries of rank R.
DIMS = {"N": 5, "M": 3, "T": 4, "S": 2, "I": 7, "O": 3, "Q": 3, "R": 2, "1": 1}


@dataclass(frozen=True)
class Spec:
    """An op: shapes of its arguments by letters, the letters its longest sum runs over, options as (usual, other)."""

    shapes: Mapping[str, str]
    sums: str
    masks: Mapping[str, str] = field(default_factory=dict)
    bias: bool = False
    options: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    target: str | None = None
    example_axis: int | None = None  # where N stands in the result
    dtypes: tuple[torch.dtype, ...] = DTYPES


TOKENS = {"a": "N T I", "delta": "N T O"}
SETS = {"a1": "M S I", "delta1": "M S O", "a2": "N T I", "delta2": "N T O"}
SINGLE = {"a1": "M 1 I", "delta1": "M 1 O", "a2": "N 1 I", "delta2": "N 1 O"}
BASIS = {"U_A": "J J", "U_G": "O O"}
MASK = {"mask": "N T"}
PER_TOKEN = {"per_token": (False, True)}

SPECS = {
    "covariance_update_": Spec({"C": "J J", "x": "N T I"}, "NT", MASK, True, target="C"),
    "eigenbasis_project": Spec({"x": "N T I", "U": "J J"}, "J", MASK, True, example_axis=0),
    "eigenbasis_rotate": Spec({"V": "Q O J", **BASIS}, "OJ", options={"inverse": (False, True)}),
    "ekfac_diagonal_update_": Spec({"Lambda": "O J", **TOKENS, **BASIS}, "NTJ", MASK, True, target="Lambda"),
    "ekfac_self_influence": Spec(
        {**TOKENS, **BASIS, "Lambda": "O J"}, "TOJ", MASK, True, {"damping": (0.1, 3.0)}, example_axis=0
    ),
    "ekfac_solve": Spec({"V": "Q O J", **BASIS, "Lambda": "O J"}, "OJ", options={"damping": (0.1, [3.0, 0.01, 0.1])}),
    "ghost_dot": Spec(SETS, "TOJ", {"mask1": "M S", "mask2": "N T"}, True, example_axis=1),
    "ghost_norm": Spec(TOKENS, "TOJ", MASK, True, example_axis=0),
    "gradient_dot": Spec({"P": "Q O J", **TOKENS}, "TOJ", MASK, True, PER_TOKEN, example_axis=1),
    "gradient_dot_low_rank": Spec({"L": "Q O R", "R": "Q R J", **TOKENS}, "TOJ", MASK, True, PER_TOKEN, example_axis=1),
    "kfac_factorize": Spec(
        {"A": "J J", "G": "O O"}, "OJ", options={"damping": (0.1, 1e-3), "split": ("pi", "even")}, dtypes=(F32, F64)
    ),
    "kfac_solve": Spec({"V": "Q O J", "L_A": "J J", "L_G": "O O"}, "OJ"),
    "per_sample_gradient": Spec(TOKENS, "T", MASK, True, example_axis=0),
    "weighted_ghost_dot": Spec(
        {**SINGLE, "weight": "O J"}, "OJ", {"mask1": "M 1", "mask2": "N 1"}, True, example_axis=1
    ),
}


@dataclass(frozen=True)
class Engine:
    """An implementation, and for the native one the instruction set it runs on."""

    implementation: str
    isa: str | None = None

    def __str__(self) -> str:
        return self.isa or self.implementation

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        before = _native.isa()
        if self.isa:
            _native.use_isa(self.isa)
        try:
            with ihvp.use(self.implementation):
                yield
        finally:
            _native.use_isa(before)


ISAS = [name for name, runs in _native.isas().items() if runs]
ENGINES = [Engine("reference"), *(Engine("native", isa) for isa in ISAS)]


def engines(op: str) -> list[Engine]:
    present = [name for name in implementations()[op] if "cpu" in DEVICES[name]]
    return [engine for engine in ENGINES if engine.implementation in present]


OPS_ON_ENGINES = [(op, engine) for op in SPECS for engine in engines(op)]
NATIVE_OPS = [op for op in SPECS if "native" in implementations()[op]]


# --- making arguments ------------------------------------------------------------------------------------------


def size(letters: str, dims: Mapping[str, int | None], bias: bool) -> tuple[int, ...]:
    """T = None stands for two-dimensional tokens."""
    sizes = {**DIMS, **dims, "J": {**DIMS, **dims}["I"] + bias}
    flat = sizes["T"] is None
    return tuple(sizes[letter] for letter in letters.split() if not (flat and letter in "T S 1".split()))


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """float64 numbers fit for an argument: orthogonal bases, positive eigenvalues, well-conditioned factors."""
    x = torch.randn(shape, generator=generator, dtype=F64)
    if name in ("U", "U_A", "U_G"):
        return torch.linalg.qr(x).Q
    if name in ("Lambda", "weight"):
        return x.abs() + 0.1
    if name in ("A", "G"):
        return x @ x.mT / max(len(x), 1) + 0.1 * torch.eye(len(x))
    if name in ("L_A", "L_G"):  # what stands above the diagonal is not read
        L = x.tril() / (2 * max(len(x), 1) ** 0.5) + torch.eye(len(x))
        return L.masked_fill(torch.ones_like(L, dtype=torch.bool).triu(1), torch.nan)
    return x


def laid_out(x: Tensor, layout: str, letters: str) -> Tensor:
    """The same values over other memory; `expanded` repeats the first example."""
    if layout == "expanded" and letters[0] in "NMQ" and len(x) > 0:
        return x[:1].expand_as(x)
    if layout in ("transposed", "expanded") and x.dim() > 1:
        return x.mT.contiguous().mT
    if layout == "strided":
        memory = torch.ones([3 * n + 1 for n in x.shape], dtype=x.dtype)
        view = memory[tuple(slice(1, 3 * n + 1, 3) for n in x.shape)]
        return view.copy_(x)
    return x


def compute_dtype(*values: Any) -> torch.dtype:
    return F64 if any(isinstance(x, Tensor) and x.dtype == F64 for x in values) else F32


@dataclass(frozen=True)
class Call:
    op: str
    arguments: dict[str, Any]
    reduction_length: int

    def __call__(self) -> Any:
        return getattr(ops, self.op)(**self.arguments)

    @property
    def target(self) -> Tensor | None:
        return self.arguments.get(SPECS[self.op].target)

    @property
    def dtype(self) -> torch.dtype:
        """In which the sums run."""
        return compute_dtype(*(x for x in self.arguments.values() if x is not self.target))

    def replace(self, **arguments: Any) -> Call:
        return replace(self, arguments={**self.arguments, **arguments})

    def fresh(self) -> Call:
        """The same call with an in-place target of its own, laid out alike."""
        if self.target is None:
            return self
        target = torch.empty_strided(self.target.shape, self.target.stride(), dtype=self.target.dtype)
        return self.replace(**{SPECS[self.op].target: target.copy_(self.target)})

    def formula(self) -> Any:
        wide = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in self.arguments.items()
        }
        return getattr(formulas, self.op)(**wide)

    def check(self, result: Any, want: Any = None) -> None:
        """The result, or both of a pair, has the dtype that is promised and the values of the formula."""
        want = self.formula() if want is None else want
        if self.op == "kfac_factorize":
            for L, damped in zip(result, want, strict=True):
                assert L.dtype == self.dtype and torch.equal(L, L.tril())
                assert_close(L.double() @ L.double().mT, damped, self.dtype, self.reduction_length)
            return
        assert result.dtype == (self.dtype if self.target is None else self.target.dtype)
        assert_close(result, want, self.dtype, self.reduction_length)


def make(
    op: str,
    dims: Mapping[str, int | None],
    dtype: torch.dtype = F32,
    *,
    factors: torch.dtype | None = None,
    accumulator: torch.dtype | None = None,
    bias: bool = False,
    masked: bool = False,
    other: bool = False,
    layout: str = "contiguous",
    seed: int = 0,
) -> Call:
    """A right call. Tokens are `dtype`, other operands `factors`; masked positions hold NaN and infinities."""
    spec, generator = SPECS[op], torch.Generator().manual_seed(seed)
    bias = bias and spec.bias
    factors = factors or dtype
    arguments: dict[str, Any] = {}
    masks = {}
    for name, letters in spec.masks.items() if masked else ():
        mask = masks[letters[0]] = torch.rand(size(letters, dims, bias), generator=generator) > 0.3
        arguments[name] = laid_out(mask, layout, letters)
    for name, letters in spec.shapes.items():
        x = draw(name, size(letters, dims, bias), generator)
        if letters[0] in masks:
            x = x.masked_fill(~masks[letters[0]][..., None], torch.nan if letters[-1] == "I" else torch.inf)
        kind = dtype if letters[0] in "NM" else factors
        if name == spec.target:
            kind = accumulator or (F64 if F64 in (dtype, factors) else F32)
        arguments[name] = laid_out(x.to(kind if kind in spec.dtypes else F32), layout, letters)
    if spec.bias:
        arguments["bias"] = bias
    for name, values in spec.options.items():
        arguments[name] = values[other]
    ordered = {name: arguments[name] for name in (*spec.shapes, *arguments)}
    return Call(op, ordered, math.prod(size(" ".join(spec.sums), dims, bias)))


# --- checking calls -----------------------------------------------------------------------------------------------


def run(call: Call) -> None:
    """The values of the formula, operands untouched, and an in-place op returns its target."""
    call, want = call.fresh(), call.formula()
    operands = {name: x.clone() for name, x in call.arguments.items() if isinstance(x, Tensor) and x is not call.target}
    result = call()
    call.check(result, want)
    assert call.target is None or result is call.target
    for name, before in operands.items():
        assert torch.equal(call.arguments[name].nan_to_num(), before.nan_to_num()), f"{name} changed"
