"""The influence classes of pyDVL against `ihvp.adapters.pydvl_api`: the same calls, at 10,001 parameters.

An MLP 64-90-41-10 trained on scikit-learn's digits, 500 training examples and 64 queries, float32. Each library runs
each method in a process of its own: fit, then the influences of all examples on all queries. Answers
are compared before a ratio is printed.

Both libraries get the same work. pyDVL squares the tolerances of CG: both stop at residuals of 1e-6. LiSSA does 100
steps with all the data. pyDVL's harmonic mean of one batch comes out divided by the number of systems that it solves at
once, which are the training examples; it is multiplied by that.

LiSSA and block CG are Hessian products of 64 vectors with 500 examples and little else: 2.3 GFLOP each by
R-differentiation, six products a layer. Both libraries take them from torch by reverse over reverse differentiation.
On one core of the machine in bench/results (torch.mm of 1024^3: 100 GFLOP/s) such a product takes ihvp 84 ms; the same
derivatives written out by hand for this very net, with torch's products and in-place elementwise operations, 52 ms, of
which the batched products, at 70 GFLOP/s, are 33. Ratios well beyond 1.5 are therefore not to be had from torch.

The Nystroem sketch is that of what pyDVL calls the Gauss-Newton matrix, the mean of g g^T, which is never negative:
pyDVL shifts a sketch that is indefinite, as the Hessian's is here, and ihvp does not. The libraries draw different
random columns; with as many columns as examples both sketches are the matrix itself, and the answers must agree.
pyDVL's products with it come out divided by the number of vectors that are multiplied at once, which are the columns:
its regularization is divided by that too, and its answers with it. The regularization is 0.3: at 0.1 the shift by
which pyDVL makes its sketch definite leaves an error of 9e-5, where ihvp's is 3e-6.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.libraries.pydvl_names import pydvl_names
from bench.measure import check, machine, once, relative_error, write

VERSION = "0.10.0"
SIZES, TRAIN, QUERIES = (64, 90, 41, 10), 500, 64
SMALL_SIZES, SMALL_TRAIN, SMALL_QUERIES = (64, 6, 10), 20, 4  # to warm up
REGULARIZATION = 0.1
STEPS, RANK, RESIDUAL = 100, 10, 1e-6
NYSTROEM_RANK = TRAIN  # no less than that of the matrix
NYSTROEM_REGULARIZATION = 0.3
LIMIT = 1e-4
REPEATS, BUDGET = 5, 60.0  # runs of a method, and the seconds after which there are no further ones
LIBRARIES = ("ihvp", "pydvl")


@dataclass(frozen=True)
class Method:
    """How to make the influence, the batch size, the goal: so many times faster than pyDVL."""

    make: Callable[[Any, nn.Module, str], Any]
    batch: int
    goal: float
    pydvl_factor: float = 1.0


def cg(api: Any, net: nn.Module, library: str) -> Any:
    atol = RESIDUAL**0.5 if library == "pydvl" else RESIDUAL
    return api.CgInfluence(net, F.cross_entropy, REGULARIZATION, rtol=0.0, atol=atol)


def cg_simultaneously(api: Any, net: nn.Module, library: str) -> Any:
    atol = RESIDUAL**0.5 if library == "pydvl" else RESIDUAL
    return api.CgInfluence(net, F.cross_entropy, REGULARIZATION, rtol=0.0, atol=atol, solve_simultaneously=True)


def lissa(api: Any, net: nn.Module, library: str) -> Any:
    return api.LissaInfluence(
        net, F.cross_entropy, REGULARIZATION, maxiter=STEPS, rtol=1e-12, warn_on_max_iteration=False
    )


def nystroem(api: Any, net: nn.Module, library: str) -> Any:
    mode = api.SecondOrderMode.GAUSS_NEWTON
    regularization = NYSTROEM_REGULARIZATION / (NYSTROEM_RANK if library == "pydvl" else 1)
    return api.NystroemSketchInfluence(net, F.cross_entropy, regularization, NYSTROEM_RANK, second_order_mode=mode)


METHODS: dict[str, Method] = {
    "direct": Method(lambda api, net, _: api.DirectInfluence(net, F.cross_entropy, REGULARIZATION), 50, 5.0),
    "CG": Method(cg, 100, 5.0),
    "CG, simultaneously": Method(cg_simultaneously, 100, 5.0),
    "EKFAC": Method(lambda api, net, _: api.EkfacInfluence(net, True, REGULARIZATION), 100, 5.0),
    "LiSSA": Method(lissa, TRAIN, 1.0),
    "Arnoldi": Method(
        lambda api, net, _: api.ArnoldiInfluence(net, F.cross_entropy, REGULARIZATION, rank=RANK), 100, 1.0
    ),
    "Nystroem": Method(nystroem, TRAIN, 1.0, 1 / NYSTROEM_RANK),
    "harmonic mean": Method(
        lambda api, net, _: api.InverseHarmonicMeanInfluence(net, F.cross_entropy, REGULARIZATION), TRAIN, 1.0, TRAIN
    ),
}


# --- one method of one library in its own process ----------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    net: nn.Module
    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


def setting(sizes: tuple[int, ...], train: int, queries: int) -> Setting:
    """Digits of scikit-learn and an MLP trained on them, on one thread: the same in every process."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    net = nn.Sequential()
    for inputs, outputs in pairwise(sizes):
        net.append(nn.Linear(inputs, outputs)).append(nn.Tanh())
    del net[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(net(x[:train]), y[:train]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    rest = slice(train, train + queries)
    return Setting(net, (x[:train], y[:train]), (x[rest], y[rest]))


def names(library: str) -> Any:
    if library == "pydvl":
        return pydvl_names()
    from ihvp.adapters import pydvl_api

    return pydvl_api


def run_child(library: str, name: str, file: Path, repeats: int) -> dict[str, Any]:
    method, api = METHODS[name], names(library)

    def run(own: Setting) -> tuple[Tensor, float, float]:
        data = DataLoader(TensorDataset(*own.train), batch_size=min(method.batch, len(own.train[0])))
        influence, fit = once(lambda: method.make(api, own.net, library).fit(data))
        values, spent = once(lambda: influence.influences(*own.queries, *own.train))
        return values.detach(), fit, spent

    run(setting(SMALL_SIZES, SMALL_TRAIN, SMALL_QUERIES))
    own = setting(SIZES, TRAIN, QUERIES)
    runs: list[tuple[float, float]] = []
    while len(runs) < repeats and sum(map(sum, runs)) < BUDGET:
        values, fit, spent = run(own)
        runs.append((fit, spent))
    torch.save(values * (method.pydvl_factor if library == "pydvl" else 1.0), file)
    return {
        "seconds": statistics.median(map(sum, runs)),
        "fastest": min(map(sum, runs)),
        "slowest": max(map(sum, runs)),
        "fit": statistics.median(fit for fit, _ in runs),
        "influences": statistics.median(spent for _, spent in runs),
        "runs": len(runs),
    }


def child(library: str, name: str, file: Path, repeats: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench", "_pydvl", library, name, str(file), str(repeats)]
    done = subprocess.run([*command, str(threads)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{library}'s run of {name} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- all of them -------------------------------------------------------------------------------------------------


def absence() -> str | None:
    """Why pyDVL cannot run here."""
    try:
        installed = importlib.metadata.version("pydvl")
    except importlib.metadata.PackageNotFoundError:
        return f"pydvl {VERSION} is not installed: pip install 'ihvp[bench]'"
    return None if installed == VERSION else f"pydvl must be {VERSION}, installed is {installed}"


def run(quick: bool, threads: int, output: Path | None, only: str) -> None:
    missing = absence()
    if missing:
        raise SystemExit(missing)
    chosen = {name: method for name, method in METHODS.items() if only.lower() in name.lower()}
    if not chosen:
        raise SystemExit(f"no method has {only!r} in its name; they are {', '.join(METHODS)}")
    print(json.dumps(machine()))
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for name, method in chosen.items():
            files = {library: Path(folder, f"{library}.pt") for library in LIBRARIES}
            found = {
                library: child(library, name, file, 1 if quick else REPEATS, threads) for library, file in files.items()
            }
            own, theirs = (torch.load(files[library]) for library in LIBRARIES)
            error = relative_error(own, theirs)
            check(f"{name}: influences of ihvp and pyDVL", error, LIMIT)
            ratio = found["pydvl"]["seconds"] / found["ihvp"]["seconds"]
            records.append(
                {"bench": "pydvl", "method": name, "quick": quick, "threads": threads, "error": error}
                | found
                | {"ratio": ratio, "goal": method.goal, "met": ratio >= method.goal}
            )
    table(records)
    write(output, records)


def table(records: Sequence[dict[str, Any]]) -> None:
    print(f"\n{'method':<20}{'pyDVL':>12}{'ihvp':>12}{'fit':>12}{'influences':>12}{'ratio':>8}{'goal':>6}")
    for record in records:
        own, theirs = record["ihvp"], record["pydvl"]
        print(
            f"{record['method']:<20}{theirs['seconds']:10.2f} s{own['seconds']:10.2f} s{own['fit']:10.2f} s"
            f"{own['influences']:10.2f} s{record['ratio']:8.1f}{record['goal']:6.0f}"
            f"{'' if record['met'] else '  not met'}"
        )
