"""`python fuzz_ops.py COUNT SEED`: random calls, right and wrong; prints as JSON how many were refused and answered.

A call has to raise TypeError, ValueError or RuntimeError (LinAlgError is one) with a message and leave an in-place
target as it was, or give the right answer: the formula's shape and its values wherever the formula is finite.
"""

from __future__ import annotations

import faulthandler
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import formulas
import torch
from op_cases import DTYPES, F32, F64, SPECS, Call, engines, make
from tolerance import tol
from torch import Tensor

REFUSALS = (TypeError, ValueError, RuntimeError)


# --- what goes wrong with a tensor -----------------------------------------------------------------------------


def resized(x: Tensor, rng: random.Random) -> Tensor:
    """One dimension shorter, longer or empty."""
    shape = list(x.shape)
    if shape:
        i = rng.randrange(len(shape))
        shape[i] = rng.choice((shape[i] + 1, max(shape[i] - 1, 0), 0, 1, 2 * shape[i]))
    return torch.ones(shape).to(x.dtype)


def poisoned(x: Tensor, rng: random.Random) -> Tensor:
    x = x.clone()
    if x.numel() and x.is_floating_point():
        x[tuple(rng.randrange(n) for n in x.shape)] = rng.choice((torch.nan, torch.inf, -torch.inf))
    return x


def overlapping(x: Tensor, rng: random.Random) -> Tensor:
    memory = torch.linspace(0.5, 1.5, sum(x.shape) + 1).to(x.dtype)
    return memory.as_strided(x.shape, [rng.choice((0, 1)) for _ in x.shape])


def negated(x: Tensor, rng: random.Random) -> Tensor:
    return torch._neg_view(x) if x.is_floating_point() else x


Change = Callable[[Tensor, random.Random], Any]
SHAPES: tuple[Change, ...] = (
    resized,
    lambda x, rng: x.mT if x.dim() > 1 else x,
    lambda x, rng: x.unsqueeze(rng.randrange(x.dim() + 1)),
    lambda x, rng: x[0] if x.dim() and len(x) else x,
    lambda x, rng: x.flatten(),
    lambda x, rng: x.new_ones(()),
)
VALUES: tuple[Change, ...] = (
    poisoned,
    lambda x, rng: x.to(rng.choice(DTYPES)),
    lambda x, rng: x[:1].expand_as(x) if x.dim() else x,
    lambda x, rng: x.mT.contiguous().mT if x.dim() > 1 else x,
    overlapping,
    negated,
    lambda x, rng: x.detach() * rng.choice((0.0, -1.0, 1e-3, 1e3)) if x.is_floating_point() else ~x,
)
KINDS: tuple[Change, ...] = (
    lambda x, rng: x.to(rng.choice((torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64))),
    lambda x, rng: x.to("meta"),
    lambda x, rng: x.to_sparse(),
    lambda x, rng: x.detach().clone().requires_grad_() if x.is_floating_point() else x.tolist(),
    lambda x, rng: rng.choice((None, 1, 0.5, "x", [1.0, 2.0], (), object(), x.tolist(), Tensor)),
)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "damping": (
        0,
        1,
        0.0,
        1e-3,
        -0.1,
        torch.nan,
        torch.inf,
        "auto",
        "",
        None,
        True,
        10**400,
        torch.ones(()),
        1j,
        b"\1",
    ),
    "dampings": ([], (), [0.1], (1.0, 2), [0.1, None], [torch.nan], [[0.1]]),
    "split": ("pi", "even", "none", None, 1, ["pi"], torch.ones(2)),
} | dict.fromkeys(("bias", "per_token", "inverse"), (True, False, 0, 1, None, "yes", torch.tensor(True), []))


def random_call(rng: random.Random) -> Call:
    op = rng.choice(list(SPECS))
    extents = (1, 1, 2, 3, 5, 9, 17, 70) if rng.random() < 0.8 else (0, 1, 2, 9)
    dims = {letter: rng.choice(extents) for letter in "NMTSIOQR"}
    if rng.random() < 0.3:
        dims["T"] = None
    dtype = rng.choice(DTYPES)
    call = make(
        op,
        dims,
        dtype,
        factors=rng.choice((dtype, dtype, F32, F64)),
        accumulator=rng.choice((None, F64)),
        bias=rng.random() < 0.5,
        masked=rng.random() < 0.5,
        other=rng.random() < 0.5,
        layout=rng.choice(("contiguous", "transposed", "strided", "expanded")),
        seed=rng.randrange(10**6),
    )
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        name, kind = rng.choice(list(call.arguments)), rng.random()
        value = call.arguments[name]
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            changes = VALUES if kind < 0.5 else SHAPES if kind < 0.8 else KINDS
            call = call.replace(**{name: rng.choice(changes)(value, rng)})
        elif name in OPTIONS:
            several = name == "damping" and rng.random() < 0.5
            call = call.replace(**{name: rng.choice(OPTIONS["dampings" if several else name])})
        if kind > 0.98:
            call = call.replace(**{name: call.arguments[rng.choice(list(call.arguments))]})
    return call


# --- what a right answer is ------------------------------------------------------------------------------------


def fits(call: Call) -> bool:
    """Whether the shapes agree, letter by letter."""
    sizes: dict[str, int] = {"1": 1}
    flat = {name: call.arguments[name].dim() == 2 for name in call.arguments if name in ("x", "a", "a1", "a2")}
    spec = SPECS[call.op]
    bias = bool(call.arguments.get("bias", False))
    for name, pattern in (*spec.shapes.items(), *((n, p) for n, p in spec.masks.items() if n in call.arguments)):
        x = call.arguments[name]
        letters = pattern.split()
        partner = name.replace("delta", "a").replace("mask", "a" if "a" + name[4:] in flat else "x")
        if flat.get(partner, False):
            del letters[1]
            sizes.setdefault(pattern.split()[1], 1)
        if x is None and name in ("U_A", "U_G", *spec.masks):
            continue
        if letters[0] == "Q" and name == "V" and x.dim() == 2:
            del letters[0]
        if x.dim() != len(letters):
            return False
        for letter, n in zip(letters, x.shape, strict=True):
            if letter == "I":
                letter, n = "J", n + bias
            if sizes.setdefault(letter, n) != n:
                return False
    return True


def magnitude(call: Call) -> Any:
    """The formula over absolute values: what rounding errors are relative to when terms cancel."""
    arguments = {
        name: x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in call.arguments.items()
    }
    if call.op == "kfac_solve":
        V, inverses = arguments["V"], []
        for L in (call.arguments["L_A"].tril(), call.arguments["L_G"].tril()):
            inverse = torch.linalg.inv_ex(L @ L.mT).inverse.abs()
            inverses.append(inverse @ (L.abs() @ L.abs().mT) @ inverse)
        return inverses[1] @ V @ inverses[0]
    damping = arguments.get("damping")
    if isinstance(damping, (list, tuple)):
        each = [magnitude(call.replace(damping=value)) for value in damping]
        return torch.stack(each) if each else call.formula()
    if damping is not None and "Lambda" in arguments:
        arguments |= {"Lambda": (call.arguments["Lambda"] + damping).abs(), "damping": 0.0}
    return getattr(formulas, call.op)(**arguments)


def mistake(call: Call, result: Any, targets_before: Tensor | None) -> str | None:
    """What is wrong with an answer, if anything."""
    values = {
        name: x.detach().resolve_neg().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in call.arguments.items()
    }
    if targets_before is not None:
        values[SPECS[call.op].target] = targets_before.double()
    wide = Call(call.op, values, call.reduction_length)
    if not fits(wide):
        return "an answer to shapes that do not fit"
    dtype, length = call.dtype, 4 * call.reduction_length
    if call.op == "kfac_factorize":
        for name in ("A", "G"):
            values[name] = values[name].tril() + values[name].tril(-1).mT
        wide_L = [L.double() for L in result]
        pairs = [(L @ L.mT, x, L.abs() @ L.abs().mT) for L, x in zip(wide_L, wide.formula(), strict=True)]
    else:
        pairs = [(result.double(), wide.formula(), magnitude(wide))]
        if result.dtype != (dtype if call.target is None else call.target.dtype):
            return f"an answer in {result.dtype}"
    tensors = [x for x in values.values() if isinstance(x, Tensor)]
    if any(x.numel() == 0 for x in tensors) and not all(x.isfinite().all() for x in tensors):
        return None  # an empty sum of infinities: 0 or NaN
    for got, want, scale in pairs:
        if got.shape != want.shape:
            return f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
        finite = want.isfinite() & scale.isfinite() & (scale < 1e30)
        error = torch.where(finite, got - want, 0.0)
        if not bool((error.abs() <= tol(dtype, length) * scale.where(finite, 1.0)).all()):
            return f"off by {float(error.abs().max()):.3g}: {got} instead of {want}"
    return None


def described(call: Call) -> str:
    def text(x: Any) -> str:
        if not isinstance(x, Tensor):
            return repr(x)
        strides = x.stride() if x.layout == torch.strided else x.layout
        return f"{x.dtype}{tuple(x.shape)} strides {strides} on {x.device}"

    return f"{call.op}({', '.join(f'{name}={text(x)}' for name, x in call.arguments.items())})"


def main(count: int, seed: int) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(900, exit=True)  # a hang becomes a failure with a traceback
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng = random.Random(seed)
    refused: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    failures = []
    for number in range(count):
        call = random_call(rng)
        engine = rng.choice(engines(call.op))
        target = call.target
        dense = isinstance(target, Tensor) and target.layout == torch.strided and target.device.type == "cpu"
        before = target.detach().clone() if dense else None
        problem = None
        try:
            with engine.running():
                result = call()
        except REFUSALS as error:
            refused[call.op] += 1
            if not str(error):
                problem = f"{type(error).__name__} without a message"
            elif dense and not torch.equal(target.detach().nan_to_num(7.0), before.nan_to_num(7.0)):
                problem = "refused, but the target has changed"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            answered[call.op] += 1
            try:
                problem = mistake(call, result, before)
            except Exception as error:
                problem = f"an answer where the formula has none: {error}"
        if problem:
            failures.append(f"{number} on {engine}: {problem}\n    {described(call)}")
    report = {"refused": refused.total(), "answered": answered.total(), "failures": failures[:20]}
    print(json.dumps({**report, "refused by": refused, "answered by": answered}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
