"""Proponents and opponents of some test digits, drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ihvp.calculators import FirstOrderInfluenceCalculator, Order
from ihvp.demo.digits import Digits, losses

SHOWN = 6  # test digits in the figure
TOP = 5  # proponents and opponents of each
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


@dataclass(frozen=True, eq=False)
class Examples:
    """The best training examples of one order for some test digits, (SHOWN,TOP)."""

    values: Tensor
    indices: Tensor


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
