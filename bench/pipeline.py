"""EKFAC end to end against other libraries: the same model, data, layers and batches.

Each library runs in a process of its own, so that memory is its own too. Numbers are checked before a ratio is
printed: kronfluence, which computes the same, on Lambda in its own eigenbasis and on the scores end to end; pyDVL, with
another Fisher, on the scores given its eigenvectors and eigenvalues. dattri has another order of parameters and
rotates by rows: its correlation with this library's scores is printed and nothing is asked of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import check, machine, relative_error, write
from bench.report import report
from bench.settings import SETTINGS, Setting, losses


@dataclass(frozen=True)
class Peer:
    """A version that the figures are about, and the times that this library must be faster: model -> step -> ratio.

    A library runs the models it has an entry for, with `repeats`; in a quick run once, if it takes part. One that takes
    longer than `limit` seconds is given up, and the table says so.
    """

    version: str
    goals: dict[str, dict[str, float]]
    repeats: int = 3
    limit: float | None = None
    quick: bool = False


PEERS = {
    "kronfluence": Peer(
        "1.0.1",
        {
            "mlp": {"fit + scores": 60.0, "fit": 30.0, "scores": 10.0, "memory": 3.0},
            "transformer": {"fit + scores": 4.0},
            "cnn": {},
        },
        quick=True,
    ),
    "pydvl": Peer("0.10.0", {"mlp": {"fit + scores": 15.0}}),
    "dattri": Peer("0.3.0", {"mlp": {}}, repeats=1, limit=420.0),
}
FIT_OVER_TWO_PASSES = {"mlp": 1.5, "transformer": 1.5}
LIMITS = {"Lambda": 1e-4, "scores": 1e-3}


def absence(peer: str) -> str | None:
    """Why a library cannot run here."""
    version = PEERS[peer].version
    try:
        installed = importlib.metadata.version(peer)
    except importlib.metadata.PackageNotFoundError:
        return f"{peer} {version} is not installed: pip install 'ihvp[bench]'"
    return None if installed == version else f"{peer} must be {version}, installed is {installed}"


def run_child(library: str, model: str, folder: Path, repeats: int, precision: str) -> dict[str, Any]:
    """In the child: run one library on one model."""
    torch.set_float32_matmul_precision(precision)
    runner = importlib.import_module(f"bench.libraries.{library}_ekfac")
    return runner.run(SETTINGS[model](), folder, repeats)


def child(
    library: str, model: str, folder: Path, repeats: int, precision: str, limit: float | None = None
) -> dict[str, Any]:
    folder.mkdir()
    arguments = [library, model, str(folder), str(repeats), precision]
    command = [sys.executable, "-W", "ignore", "-m", "bench", "_child", *arguments]
    print(f"run    {library} on the {model}, {repeats} times", flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"missing": f"{library} had not finished after {limit:.0f} s"}
    if done.returncode != 0:
        raise SystemExit(f"the run of {library} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- checks ----------------------------------------------------------------------------------------------------


def check_kronfluence(setting: Setting, folder: Path, own_folder: Path) -> None:
    import ihvp
    from ihvp.capture import capture

    eigen, theirs = torch.load(folder / "eigen.pt"), torch.load(folder / "lambda.pt")
    model = ihvp.InfluenceModel(setting.net, losses, layers=setting.layers, progress=False)
    total = {name: torch.zeros(layer.shape, dtype=torch.float64) for name, layer in model.layers.items()}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        U_A, U_G = eigen["activation_eigenvectors"][layer.name], eigen["gradient_eigenvectors"][layer.name]
        ihvp.ops.ekfac_diagonal_update_(total[layer.name], a, delta, U_A, U_G, mask=mask, bias=layer.bias)

    for pair in setting.batches:
        capture(model, model.batch(pair), sink)
    worst = max(relative_error(own, theirs[name]) for name, own in total.items())
    check("Lambda given kronfluence's eigenvectors, the worst layer", worst, LIMITS["Lambda"])
    scores = torch.load(own_folder / "scores.pt"), torch.load(folder / "scores.pt")
    check(
        "scores end to end against kronfluence, each with its own eigenvectors",
        relative_error(*scores),
        LIMITS["scores"],
    )


def check_pydvl(setting: Setting, folder: Path, own_folder: Path) -> None:
    import ihvp
    from ihvp import ops

    from bench.libraries.pydvl_ekfac import DAMPING

    eigen = torch.load(folder / "eigen.pt")
    model = ihvp.InfluenceModel(setting.net, losses, layers=setting.layers, progress=False)
    P = {
        name: ops.ekfac_solve(g, eigen[name]["U_A"], eigen[name]["U_G"], eigen[name]["Lambda"], DAMPING)
        for name, g in gradients(model, [setting.queries]).items()
    }
    trains = gradients(model, setting.batches)
    scores = torch.stack([P[name].flatten(1) @ g.flatten(1).T for name, g in trains.items()]).sum(0)
    theirs = torch.load(folder / "scores.pt")
    check("scores given pyDVL's eigenvectors and eigenvalues", relative_error(theirs, scores), LIMITS["scores"])


def gradients(model: Any, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Layer name -> (N,O,I'), whole."""
    from ihvp import ops
    from ihvp.capture import capture

    parts: dict[str, list[Tensor]] = {name: [] for name in model.layers}

    def sink(layer: Any, a: Tensor, delta: Tensor, mask: Tensor | None) -> None:
        parts[layer.name].append(ops.per_sample_gradient(a, delta, mask=mask, bias=layer.bias))

    for pair in pairs:
        capture(model, model.batch(pair), sink)
    return {name: torch.cat(own) for name, own in parts.items()}


def check_dattri(setting: Setting, folder: Path, own_folder: Path) -> None:
    both = torch.stack([torch.load(path / "scores.pt").flatten() for path in (folder, own_folder)])
    print(f"info   correlation of dattri's scores with this library's: {torch.corrcoef(both)[0, 1]:.3f}; not a check")


CHECKS = {"kronfluence": check_kronfluence, "pydvl": check_pydvl, "dattri": check_dattri}


# --- figures ---------------------------------------------------------------------------------------------------


def totals(result: dict[str, Any]) -> dict[str, float]:
    """Medians: the fit with all its steps, the scores, both, and the memory in MB."""
    medians = {step: statistics.median(values) for step, values in result["seconds"].items()}
    scores = medians["scores"]
    fit = medians["fit"] if "fit" in medians else sum(value for step, value in medians.items() if step != "scores")
    return {"fit": fit, "scores": scores, "fit + scores": fit + scores, "memory": result["memory"] / 1e6}


def goal(against: str, what: str, reached: float, bound: float, least: bool = True) -> dict[str, Any]:
    met = reached >= bound if least else reached <= bound
    return {"against": against, "what": what, "least" if least else "most": bound, "figure": reached, "met": met}


KEPT = "ihvp, tokens kept"


def goals(model: str, who: str, own: dict[str, Any], peers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for peer, result in peers.items():
        if "missing" in result:
            continue
        ratios = {what: value / totals(own)[what] for what, value in totals(result).items()}
        bounds = PEERS[peer].goals[model]
        found += [goal(peer, f"{who}: {what}", ratios[what], bound) for what, bound in bounds.items()]
    if model not in FIT_OVER_TWO_PASSES:
        return found
    seconds = own["seconds"]
    parts = zip(seconds["fit"], seconds["eigendecomposition"], seconds["two plain passes"], strict=True)
    over = statistics.median((fit - eigen) / plain for fit, eigen, plain in parts)
    what, bound = f"{who}: fit without eigendecomposition", FIT_OVER_TWO_PASSES[model]
    return [*found, goal("two plain passes", what, over, bound, least=False)]


def compare(model: str, quick: bool, precision: str) -> dict[str, Any]:
    setting = SETTINGS[model]()
    peers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        own_folder = Path(temporary, "ihvp")
        own = child("ihvp", model, own_folder, 5 if quick else 9, precision)
        kept_folder = Path(temporary, "ihvp_kept")
        kept = child("ihvp_kept", model, kept_folder, 5 if quick else 9, precision)
        same = torch.equal(*(torch.load(path / "scores.pt") for path in (own_folder, kept_folder)))
        print(f"check  scores with tokens kept between passes: {'the same bits' if same else 'other bits'}")
        if not same:
            raise SystemExit("keeping tokens changed the scores")
        for peer in PEERS:
            if model not in PEERS[peer].goals:
                continue
            missing = f"{peer} is left out of --quick" if quick and not PEERS[peer].quick else absence(peer)
            if missing:
                print(f"absent {missing}")
                peers[peer] = {"missing": missing}
                continue
            folder = Path(temporary, peer)
            repeats = 1 if quick else PEERS[peer].repeats
            peers[peer] = child(peer, model, folder, repeats, precision, PEERS[peer].limit)
            if "missing" not in peers[peer]:
                CHECKS[peer](setting, folder, own_folder)
    record = {"bench": "pipeline", "model": model, "title": setting.title, "precision": precision}
    return record | {
        "ihvp": own,
        KEPT: kept,
        **peers,
        "totals": {"ihvp": totals(own), KEPT: totals(kept)}
        | {peer: totals(result) for peer, result in peers.items() if "missing" not in result},
        "goals": goals(model, "ihvp", own, peers) + goals(model, KEPT, kept, peers),
    }


def run(models: list[str], quick: bool, output: Path | None, precision: str) -> None:
    print(json.dumps(machine()))
    for model in models:
        record = compare(model, quick, precision)
        report([record])
        write(output, [record])
