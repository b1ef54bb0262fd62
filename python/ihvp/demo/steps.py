"""The steps of the demo, and what they found, in words."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ihvp.calculators import FirstOrderInfluenceCalculator, Order
from ihvp.demo.digits import influence_model, load, train, train_losses
from ihvp.demo.figure import chosen, draw, top
from ihvp.demo.measures import REFERENCES, Agreement, Detection, compare, detection
from ihvp.methods import EKFACIHVP


@dataclass(frozen=True)
class Settings:
    """How much is trained and compared."""

    train: int
    epochs: int
    queries: int  # test digits in the comparison with exact scores


FULL = Settings(train=1437, epochs=40, queries=100)
QUICK = Settings(train=900, epochs=30, queries=30)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found. `loss` ranks by the training loss alone, the simplest rival of self-influence."""

    test_accuracy: float
    self_influence: Detection
    loss: Detection
    agreements: tuple[Agreement, ...]
    seconds: Mapping[str, float]
    figure: Path

    @property
    def auc(self) -> float:
        return self.self_influence.auc

    @property
    def recall(self) -> float:
        return self.self_influence.recall

    @property
    def correlation(self) -> float:
        """Pearson correlation of EKFAC's scores with exact ones, the lowest of all references."""
        return min(own.pearson for own in self.agreements if own.method == "EKFAC")


def run(quick: bool, output: Path, seed: int) -> DemoResult:
    """Train, fit, score, draw and compare; prints what it finds. The figure goes to the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    with one_thread():
        result = measure(QUICK if quick else FULL, output / "digits.png", seed)
    print(f"\n{report(result)}")
    return result


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Products this small cost less than waking a second thread; nor does the result depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(settings: Settings, path: Path, seed: int) -> DemoResult:
    """All steps, each printed with its seconds."""
    seconds: dict[str, float] = {}
    timed = partial(step, seconds)
    digits = load(settings.train, seed)
    print(
        f"scikit-learn's digits: {len(digits.train_y):,} to train on, of which {int(digits.flipped.sum())} got a wrong "
        f"label, {len(digits.test_y)} to test"
    )
    with timed("train the network"):
        net = train(digits, settings.epochs, seed)
    accuracy = float((net(digits.test_x).argmax(1) == digits.test_y).float().mean())
    model = influence_model(net)
    with timed("fit EKFAC"):
        curvature = EKFACIHVP(model, digits.train_loader, damping="auto")
    calculator = FirstOrderInfluenceCalculator(model, digits.train_loader, curvature)
    with timed("self-influence of the training digits"):
        self_scores = calculator.self_scores()
    with timed("proponents and opponents"):
        shown = chosen(net, digits, seed)
        proponents, opponents = (top(calculator, digits, shown, order) for order in (Order.DESCENDING, Order.ASCENDING))
    with timed("draw the figure"):
        draw(net, digits, shown, proponents, opponents).savefig(path)
    with timed("compare with exact scores"):
        agreements = tuple(own for one in REFERENCES for own in compare(net, digits, one, settings.queries))

    return DemoResult(
        accuracy,
        detection(self_scores, digits.flipped),
        detection(train_losses(net, digits), digits.flipped),
        agreements,
        seconds,
        path,
    )


@contextlib.contextmanager
def step(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Print the name of a step and the seconds that it took, and note them."""
    print(f"  {name:<40}", end="", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{seconds[name]:8.2f} s", flush=True)


def report(result: DemoResult) -> str:
    """What the demo found, in words and tables."""
    return "\n".join(
        [
            f"The network is right on {result.test_accuracy:.1%} of the test digits.",
            "",
            "Finding the wrong labels by                ROC AUC   found in the first 10 % inspected",
            f"  self-influence, EKFAC                    {result.auc:7.3f}   {result.recall:.0%}",
            f"  training loss alone                      {result.loss.auc:7.3f}   {result.loss.recall:.0%}",
            "",
            *agreement_table(result.agreements),
            "",
            f"Proponents and opponents of some test digits: {result.figure}",
            f"{sum(result.seconds.values()):.1f} s in all.",
        ]
    )


def agreement_table(agreements: Sequence[Agreement]) -> list[str]:
    """A row for each method, two columns for each reference."""
    references = list(dict.fromkeys(own.reference for own in agreements))
    rows: dict[str, list[str]] = {}
    for own in agreements:
        rows.setdefault(own.method, []).append(f"{own.pearson:11.2f}{own.spearman:10.2f}")
    return [
        "Correlation with the exact scores at the same damping (over the training digits, mean over test digits)",
        " " * 12 + "".join(f"{one.curvature + ', ' + one.layers:>29}" for one in references),
        " " * 12 + f"{'Pearson':>19}{'Spearman':>10}" * len(references),
        *(f"  {name:<10}" + "".join(f"{cell:>29}" for cell in cells) for name, cells in rows.items()),
    ]
