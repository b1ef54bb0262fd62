"""Every method and calculator looks for mislabelled digits: how many it finds, in what time and memory.

The data and the network are the demo's: scikit-learn's digits, 5 % of the training labels flipped, an MLP 64-64-32-10.
Each method gives every training digit a value, and higher means more suspect: nothing is fitted to the flips. Each
runs in a process of its own, so that memory is its own too: peak resident memory above that of the process with
everything imported, the data made and the network read. A method that is not better than chance fails the bench.

The demo's weight decay keeps its network from learning the wrong labels by heart. Distances to the boundary tell
something of a label only once it has been learnt, so they are those of the same network trained on without it.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ihvp
import torch
from ihvp.demo import digits as demo
from ihvp.demo import measures, steps
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.measure import machine, once, peak_memory, write

CHECKPOINTS = (0.25, 0.5, 0.75, 1.0)  # of the epochs
LEARNING_RATE = 3e-3  # the demo's
EXTRA_EPOCHS = 150
QUERIES = 50  # test digits
SEED = 0


@dataclass(frozen=True, eq=False)
class Setting:
    """The digits, the trained network, its checkpoints, and the network that learnt the wrong labels by heart."""

    digits: demo.Digits
    net: nn.Module
    checkpoints: list[dict[str, Tensor]]
    overfitted: nn.Module

    def model(self, layers: str) -> ihvp.InfluenceModel:
        return demo.influence_model(self.net, {"all": 0, "last": -1}[layers])

    @property
    def train(self) -> demo.Loader:
        return self.digits.train_loader


Suspicion = Callable[[Setting, ihvp.InfluenceModel], Tensor]
"""(N,), higher is more suspect."""


@dataclass(frozen=True)
class Case:
    """A method, the layers that it looks at and what it computes."""

    name: str
    layers: str
    suspicion: Suspicion


def by_self_influence(method: str, options: Mapping[str, Any], normalize: str | bool = False) -> Suspicion:
    """g_n^T (F + damping I)^-1 g_n, of the IHVP object of that name."""

    def suspicion(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
        curvature = ihvp.make_ihvp(method, model, setting.train, options)
        return ihvp.FirstOrderInfluenceCalculator(model, setting.train, curvature, normalize).self_scores()

    return suspicion


def by_harm(method: str, options: Mapping[str, Any]) -> Suspicion:
    """How much training on the example raised the mean loss of some test digits: few systems for iterative solvers."""

    def suspicion(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
        curvature = ihvp.make_ihvp(method, model, setting.train, options)
        calculator = ihvp.FirstOrderInfluenceCalculator(model, setting.train, curvature, sign="loss_change")
        return calculator.scores(setting.digits.test_loader(torch.arange(QUERIES))).mean(0)

    return suspicion


def by_second_order(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    """Each example as a group of its own, on itself."""
    curvature = ihvp.FisherIHVP(model, setting.train, DAMPING)
    calculator = ihvp.SecondOrderInfluenceCalculator(model, setting.train, curvature)
    groups = [[(x[None], y[None])] for x, y in zip(setting.digits.train_x, setting.digits.train_y, strict=True)]
    return torch.cat(list(calculator.estimate_influence_values_group(groups)))[:, 0]


def by_two_stages(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    """Halfway through the training as one stage, the rest of it as the next."""
    early = copy.deepcopy(setting.net)
    early.load_state_dict(setting.checkpoints[1])
    stages = [ihvp.EKFACIHVP(own, setting.train, "auto") for own in (demo.influence_model(early), model)]
    return ihvp.MultiStageInfluenceCalculator(stages, setting.train).self_scores()


def by_tracin(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return ihvp.TracInCalculator(model, setting.train, setting.checkpoints, LEARNING_RATE).self_scores()


def by_empirical_influence(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return ihvp.EmpiricalInfluence(model, setting.train).self_scores()


def by_representer_l2(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return ihvp.RepresenterPointL2(model, setting.train, DAMPING).self_scores()


def by_representer_lje(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    curvature = ihvp.ExactIHVP(model, setting.train, DAMPING)
    return ihvp.RepresenterPointLJE(model, setting.train, curvature).self_scores()


def by_sample_boundary(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return ihvp.SampleBoundaryCalculator(demo.influence_model(setting.overfitted), setting.train).self_scores()


def by_weights_boundary(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return ihvp.WeightsBoundaryCalculator(demo.influence_model(setting.overfitted), setting.train).self_scores()


def by_loss(setting: Setting, model: ihvp.InfluenceModel) -> Tensor:
    return demo.train_losses(setting.net, setting.digits)


DAMPING = 1e-3
AUTO: dict[str, Any] = {"damping": "auto"}
FIXED: dict[str, Any] = {"damping": DAMPING}
LISSA: dict[str, Any] = {**FIXED, "maxiter": 200, "on_failure": "return"}

CASES = (
    Case("training loss alone", "all", by_loss),
    Case("identity", "all", by_self_influence("identity", {})),
    Case("diagonal", "all", by_self_influence("diagonal", AUTO)),
    Case("KFAC", "all", by_self_influence("kfac", AUTO)),
    Case("EKFAC", "all", by_self_influence("ekfac", AUTO)),
    Case("EKFAC, RelatIF (loss)", "all", by_self_influence("ekfac", AUTO, "loss")),
    Case("EKFAC, harm to test digits", "all", by_harm("ekfac", AUTO)),
    Case("EKFAC, two stages", "all", by_two_stages),
    Case("Fisher", "all", by_self_influence("fisher", AUTO)),
    Case("DataInf", "all", by_self_influence("datainf", AUTO)),
    Case("harmonic mean", "all", by_self_influence("harmonic_mean", FIXED)),
    Case("TracIn", "all", by_tracin),
    Case("EmpiricalIF", "all", by_empirical_influence),
    Case("boundary, sample", "all", by_sample_boundary),
    Case("boundary, weights", "all", by_weights_boundary),
    Case("Hessian", "last", by_self_influence("exact", FIXED)),
    Case("Gauss-Newton", "last", by_self_influence("exact", {**FIXED, "curvature": "gauss_newton"})),
    Case("CG, harm to test digits", "last", by_harm("cgd", FIXED)),
    Case("LiSSA, harm to test digits", "last", by_harm("lissa", LISSA)),
    Case("Arnoldi, rank 100", "last", by_self_influence("arnoldi", {**FIXED, "rank": 100})),
    Case("Nystroem, rank 100", "last", by_self_influence("nystroem", {**FIXED, "rank": 100})),
    Case("second order, groups of one", "last", by_second_order),
    Case("TracIn, last layer", "last", by_tracin),
    Case("representer points, L2", "last", by_representer_l2),
    Case("representer points, LJE", "last", by_representer_lje),
)


# --- one method in its own process -------------------------------------------------------------------------------


def read(folder: Path) -> Setting:
    own = torch.load(folder / "setting.pt", weights_only=False)
    return Setting(**own)


def run_child(name: str, folder: Path) -> dict[str, Any]:
    (case,) = (own for own in CASES if own.name == name)
    setting = read(folder)
    with steps.one_thread():
        before = peak_memory()
        values, seconds = once(lambda: case.suspicion(setting, setting.model(case.layers)))
    return {"values": values.tolist(), "seconds": seconds, "memory": peak_memory() - before}


def child(name: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "bench", "_method", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the run of {name} failed:\n{done.stdout}\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- all of them -------------------------------------------------------------------------------------------------


def prepare(folder: Path, quick: bool) -> Setting:
    settings = steps.QUICK if quick else steps.FULL
    digits = demo.load(settings.train, SEED)
    with steps.one_thread():
        # The same seed gives the same training, stopped earlier.
        nets = [demo.train(digits, round(share * settings.epochs), SEED) for share in CHECKPOINTS]
        overfitted = overfit(digits, nets[-1])
    setting = Setting(digits, nets[-1], [net.state_dict() for net in nets], overfitted)
    torch.save(vars(setting), folder / "setting.pt")
    return setting


def overfit(digits: demo.Digits, net: nn.Module) -> nn.Module:
    """A copy of the net, trained on without weight decay."""
    net = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for _ in range(EXTRA_EPOCHS):
            for rows in torch.randperm(len(digits.train_y)).split(demo.BATCH):
                optimizer.zero_grad()
                demo.losses(net(digits.train_x[rows]), digits.train_y[rows]).mean().backward()
                optimizer.step()
    return net


def chance(flipped: Tensor) -> float:
    """ROC AUC that a random order exceeds once in a thousand: three standard errors of the rank-sum over 0.5."""
    n, m = int(flipped.sum()), int((~flipped).sum())
    return 0.5 + 3 * math.sqrt((n + m + 1) / (12 * n * m))


def curve(values: Tensor, flipped: Tensor) -> Tensor:
    """(N+1,): the share of the flipped labels among the first n."""
    found = flipped[values.argsort(descending=True, stable=True)].cumsum(0) / flipped.sum()
    return torch.cat([torch.zeros(1), found])


def draw(curves: Mapping[str, tuple[str, float, Tensor]], path: Path) -> None:
    """Detection curves, (layers, AUC, curve) by name, a panel for each choice of layers."""
    figure = Figure(figsize=(15, 6.5), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, layers in zip(panels, ("all", "last"), strict=True):
        own = {name: (auc, found) for name, (of, auc, found) in curves.items() if of == layers}
        for i, (name, (auc, found)) in enumerate(sorted(own.items(), key=lambda one: -one[1][0])):
            share = torch.linspace(0, 1, len(found))
            style = ("-", "--", "-.")[i // 5 % 3]
            axes.plot(share, found, style, color=f"C{i % 10}", label=f"{name}  {auc:.3f}", linewidth=1.6)
        axes.plot([0, 1], [0, 1], ":", color="grey", label="chance")
        axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="share of the training digits inspected")
        axes.set_title({"all": "all layers", "last": "last layer"}[layers])
        axes.legend(title="ROC AUC", loc="lower right", fontsize=9)
    panels[0].set_ylabel("share of the wrong labels found")
    figure.suptitle("Finding wrong labels among scikit-learn's digits")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


HEADING = f"{'method':<30}{'layers':<8}{'ROC AUC':>8}{'in first 10 %':>15}{'time':>11}{'memory':>12}"


def row(record: dict[str, Any]) -> str:
    return (
        f"{record['method']:<30}{record['layers']:<8}{record['auc']:8.3f}{record['recall']:15.0%}"
        f"{record['seconds']:9.2f} s{record['memory'] / 1e6:9.1f} MB"
    )


def table(records: Sequence[dict[str, Any]]) -> None:
    print("", HEADING, *map(row, records), sep="\n")


def run(quick: bool, output: Path | None, figure: Path, only: str) -> None:
    print(json.dumps(machine()))
    cases = [case for case in CASES if only.lower() in case.name.lower()]
    if not cases:
        raise SystemExit(f"no method has {only!r} in its name; they are {', '.join(case.name for case in CASES)}")
    records: list[dict[str, Any]] = []
    curves: dict[str, tuple[str, float, Tensor]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        flipped = prepare(Path(temporary), quick).digits.flipped
        limit = chance(flipped)
        print(
            f"{len(flipped)} digits, {int(flipped.sum())} wrong labels; better than chance: ROC AUC above {limit:.3f}\n"
        )
        print(HEADING)
        for case in cases:
            own = child(case.name, Path(temporary))
            values = torch.tensor(own["values"], dtype=torch.float64)
            found = measures.detection(values, flipped)
            curves[case.name] = (case.layers, found.auc, curve(values, flipped))
            result = {"auc": found.auc, "recall": found.recall, "seconds": own["seconds"], "memory": own["memory"]}
            records.append({"bench": "methods", "method": case.name, "layers": case.layers, "quick": quick, **result})
            print(row(records[-1]), flush=True)
    draw(curves, figure)
    write(output, records)
    print(f"\ndetection curves: {figure}")
    failed = [record["method"] for record in records if not record["auc"] > limit]
    if failed:
        raise SystemExit(f"not better than chance: {', '.join(failed)}")
