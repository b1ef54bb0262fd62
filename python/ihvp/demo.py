"""The main job on real data: which training digits have a wrong label, and which made the model predict as it does?

An MLP is trained on scikit-learn's digits after 5 % of the training labels were flipped. Nothing but the evaluation
knows which.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ihvp.calculators import FirstOrderInfluenceCalculator, Order
from ihvp.methods import EKFACIHVP, IHVP, KFACIHVP, DiagonalIHVP, ExactIHVP, FisherIHVP, IdentityIHVP
from ihvp.model import InfluenceModel

CLASSES = 10
FLIPPED = 0.05  # share of the training labels
INSPECTED = 0.1  # share of the training data looked through for wrong labels
TEST = 360
SHOWN = 6  # test digits in the figure
TOP = 5  # proponents and opponents of each
BATCH = 64

RED, GREY, LIGHT = "#c1121f", "#555555", "#bbbbbb"
HEADINGS = (
    "test digit",
    "proponents: training on them lowered its loss",
    "opponents: training on them raised its loss",
)
CAPTION = (
    "Below a training digit: its label and its score g_test^T (F + damping I)^-1 g_train, where F is EKFAC's, of all "
    "layers. Red frame: its label had been flipped."
)

Loader = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How much is trained and compared."""

    train: int
    epochs: int
    queries: int  # test digits in the comparison with exact scores


FULL = Settings(train=1437, epochs=40, queries=100)
QUICK = Settings(train=900, epochs=30, queries=30)


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (N,64) in [0, 1] with labels. `true_y` are the training labels before the flips."""

    train_x: Tensor
    train_y: Tensor
    true_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def flipped(self) -> Tensor:
        return self.train_y != self.true_y

    @property
    def train_loader(self) -> Loader:
        return batches(self.train_x, self.train_y)

    def test_loader(self, indices: Tensor) -> Loader:
        return batches(self.test_x[indices], self.test_y[indices])


@dataclass(frozen=True)
class Detection:
    """How well scores rank flipped labels first."""

    auc: float
    recall: float


@dataclass(frozen=True)
class Reference:
    """Exact scores to compare with: the curvature over all parameters from `start_layer` to the end of the net."""

    curvature: str
    layers: str
    start_layer: int


FISHER, GAUSS_NEWTON = "Fisher", "Gauss-Newton"
REFERENCES = (
    Reference(GAUSS_NEWTON, "last layer", -1),
    Reference(FISHER, "last layer", -1),
    Reference(FISHER, "last two layers", -2),
)


@dataclass(frozen=True)
class Agreement:
    """Correlation of a method's scores with exact ones over the training data, mean over the queries."""

    reference: Reference
    method: str
    pearson: float
    spearman: float


@dataclass(frozen=True, eq=False)
class Examples:
    """The best training examples of one order for some test digits, (SHOWN,TOP)."""

    values: Tensor
    indices: Tensor


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


# --- data and network -------------------------------------------------------------------------------------------


def load(train_size: int, seed: int) -> Digits:
    """The digits, shuffled and split, with a share of the training labels replaced by another class."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)[: train_size + TEST]
    x = torch.from_numpy(data.data).float()[order] / 16
    y = torch.from_numpy(data.target)[order]
    train_y = y[:train_size].clone()
    flips = torch.randperm(train_size, generator=generator)[: round(FLIPPED * train_size)]
    train_y[flips] = (train_y[flips] + torch.randint(1, CLASSES, flips.shape, generator=generator)) % CLASSES
    return Digits(x[:train_size], train_y, y[:train_size], x[train_size:], y[train_size:])


def batches(x: Tensor, y: Tensor) -> Loader:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def train(digits: Digits, epochs: int, seed: int) -> nn.Sequential:
    """A 64-64-32-10 MLP. The weight decay keeps it from learning the wrong labels by heart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1.0)
        for _ in range(epochs):
            for rows in torch.randperm(len(digits.train_y)).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(net(digits.train_x[rows]), digits.train_y[rows]).backward()
                optimizer.step()
    return net.eval()


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """One loss per example (N,)."""
    return cross_entropy(outputs, targets, reduction="none")


def train_losses(net: nn.Module, digits: Digits) -> Tensor:
    with torch.no_grad():
        return losses(net(digits.train_x), digits.train_y)


def influence_model(net: nn.Module, start_layer: int = 0) -> InfluenceModel:
    return InfluenceModel(net, losses, start_layer=start_layer, progress=False)


# --- wrong labels -----------------------------------------------------------------------------------------------


def detection(scores: Tensor, flipped: Tensor) -> Detection:
    """ROC AUC of the scores, and the share of flipped labels among the highest tenth."""
    first = scores.argsort(descending=True)[: round(INSPECTED * len(scores))]
    return Detection(
        auc=float(roc_auc_score(flipped.numpy(), scores.numpy())),
        recall=float(flipped[first].sum() / flipped.sum()),
    )


# --- proponents and opponents -----------------------------------------------------------------------------------


def chosen(net: nn.Module, digits: Digits, seed: int) -> Tensor:
    """Test digits to show: those of the highest loss, then as many at random."""
    with torch.no_grad():
        worst = losses(net(digits.test_x), digits.test_y).argsort(descending=True)[: SHOWN // 2]
    others = torch.randperm(len(digits.test_y), generator=torch.Generator().manual_seed(seed))
    others = others[~torch.isin(others, worst)]
    return torch.cat([worst, others[: SHOWN - len(worst)]])


def top(calculator: FirstOrderInfluenceCalculator, digits: Digits, shown: Tensor, order: Order) -> Examples:
    ((_, values, indices),) = calculator.top_k(digits.test_loader(shown), k=TOP, order=order)
    return Examples(values, indices)


def draw(net: nn.Module, digits: Digits, shown: Tensor, proponents: Examples, opponents: Examples) -> Figure:
    """A row for each test digit: the digit, its proponents, its opponents."""
    with torch.no_grad():
        predicted = net(digits.test_x[shown]).argmax(1).tolist()
    figure = Figure(figsize=(13, 1.6 * SHOWN + 1.5), dpi=110)
    widths = [1.0, 0.45, *[1.0] * TOP, 0.45, *[1.0] * TOP]
    grid = figure.add_gridspec(
        SHOWN, len(widths), width_ratios=widths, left=0.03, right=0.97, top=0.885, bottom=0.085, hspace=0.6, wspace=0.1
    )
    images = [column for column, width in enumerate(widths) if width == 1]
    for row, query in enumerate(shown.tolist()):
        cells = [figure.add_subplot(grid[row, column]) for column in images]
        draw_query(cells[0], digits.test_x[query], int(digits.test_y[query]), predicted[row])
        indices = torch.cat([proponents.indices[row], opponents.indices[row]]).tolist()
        values = torch.cat([proponents.values[row], opponents.values[row]]).tolist()
        for axes, index, value in zip(cells[1:], indices, values, strict=True):
            draw_training(axes, digits, index, value)
        if row == 0:
            for column, heading in zip((0, 1 + TOP // 2, 1 + TOP + TOP // 2), HEADINGS, strict=True):
                cells[column].set_title(heading, fontsize=12, pad=14)
    figure.suptitle("Which training digits made the network predict as it does?", fontsize=16, y=0.975)
    figure.text(0.5, 0.022, CAPTION, ha="center", fontsize=10, color=GREY)
    return figure


def draw_query(axes: Axes, image: Tensor, label: int, predicted: int) -> None:
    draw_image(axes, image, "black", 1.5)
    wrong = predicted != label
    axes.set_xlabel(f"{label}, taken for {predicted}" if wrong else f"{label}", fontsize=10, fontweight="bold")


def draw_training(axes: Axes, digits: Digits, index: int, score: float) -> None:
    """A training digit over its label and score, framed where the label was flipped."""
    label, true = int(digits.train_y[index]), int(digits.true_y[index])
    flipped = label != true
    draw_image(axes, digits.train_x[index], RED if flipped else LIGHT, 3.0 if flipped else 0.8)
    text = f"{label} (was {true})" if flipped else f"{label}"
    axes.set_xlabel(f"{text}\n{number(score)}", fontsize=9, color=RED if flipped else "black")


def number(score: float) -> str:
    """Three digits or more, and never a power of ten."""
    return f"{score:+,.0f}" if abs(score) >= 100 else f"{score:+.3g}"


def draw_image(axes: Axes, image: Tensor, frame: str, width: float) -> None:
    axes.imshow(image.view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.xaxis.labelpad = 3
    for spine in axes.spines.values():
        spine.set(edgecolor=frame, linewidth=width)


# --- exact scores -----------------------------------------------------------------------------------------------


def compare(net: nn.Module, digits: Digits, reference: Reference, queries: int) -> tuple[Agreement, ...]:
    """Every approximation against the exact curvature of the same layers, all with the same damping.

    With cross-entropy the Gauss-Newton matrix is the Fisher matrix of the model's own targets, so there the
    approximations are fitted to sampled ones.
    """
    model = influence_model(net, reference.start_layer)
    train_loader, test_loader = digits.train_loader, digits.test_loader(torch.arange(queries))
    fisher = "empirical" if reference.curvature == FISHER else "sampled"
    damping = 0.1 * mean_eigenvalue(EKFACIHVP(model, train_loader, fisher=fisher))
    methods: dict[str, IHVP] = {
        "EKFAC": EKFACIHVP(model, train_loader, damping, fisher=fisher),
        "KFAC": KFACIHVP(model, train_loader, damping, split="none", fisher=fisher),
        "diagonal": DiagonalIHVP(model, train_loader, damping, fisher=fisher),
        "identity": IdentityIHVP(model),
    }
    exact: IHVP = (
        FisherIHVP(model, train_loader, damping)
        if reference.curvature == FISHER
        else ExactIHVP(model, train_loader, damping, curvature="gauss_newton")
    )

    def scores(curvature: IHVP) -> Tensor:
        return FirstOrderInfluenceCalculator(model, train_loader, curvature).scores(test_loader)

    wanted = scores(exact)
    return tuple(agreement(reference, name, scores(curvature), wanted) for name, curvature in methods.items())


def mean_eigenvalue(curvature: EKFACIHVP) -> float:
    """Over all layers. The exact Fisher has the same, since a change of basis keeps the trace."""
    return float(torch.cat([Lambda.flatten() for Lambda in curvature.evals.values()]).mean())


def agreement(reference: Reference, method: str, scores: Tensor, exact: Tensor) -> Agreement:
    return Agreement(reference, method, correlation(scores, exact), correlation(ranks(scores), ranks(exact)))


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's, of each row of x with that of y; the mean over rows."""
    x, y = (z.double() - z.double().mean(1, keepdim=True) for z in (x, y))
    return float(torch.cosine_similarity(x, y, dim=1, eps=0.0).mean())


def ranks(x: Tensor) -> Tensor:
    return x.argsort(dim=1).argsort(dim=1)


# --- report -----------------------------------------------------------------------------------------------------


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
