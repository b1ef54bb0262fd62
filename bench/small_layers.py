"""A scoring pass over a net with 500 adapters: many layers a call against a call a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import ihvp
import torch
import torch.nn.functional as F
from ihvp.capture import capture
from ihvp.methods import queries
from ihvp.methods.scoring import BatchScores
from torch import Tensor, nn

from bench.measure import FULL, QUICK, check, once, race, relative_error, write
from bench.report import report

WIDTHS, RANK, ADAPTERS = (64, 96, 128), 8, 250  # two layers each
EXAMPLES, QUERIES, CLASSES = 16, 16, 10


class Adapter(nn.Module):
    """A low-rank residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.A, self.B = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.B(self.A(x))


class Adapted(nn.Module):
    """As many adapters of each width, the widths joined by frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.joints = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((WIDTHS[0], *WIDTHS, CLASSES)))
        counts = [ADAPTERS // len(WIDTHS) + (i < ADAPTERS % len(WIDTHS)) for i in range(len(WIDTHS))]
        self.adapters = nn.ModuleList(
            nn.Sequential(*(Adapter(width) for _ in range(count))) for width, count in zip(WIDTHS, counts, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        for joint, adapters in zip(self.joints[:-1], self.adapters, strict=True):
            x = adapters(joint(x).tanh())
        return self.joints[-1](x)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")


@contextmanager
def one_by_one() -> Iterator[None]:
    """No number of small layers is worth collecting."""
    before, queries.MANY = queries.MANY, 1 << 30
    try:
        yield
    finally:
        queries.MANY = before


def run(output: Path | None, device: torch.device, positions: int, quick: bool) -> None:
    """The scores of both agree before a time is printed. A pass is capture and scores; capture is timed alone too."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench small-layers --device cuda needs a CUDA device, and there is none")
    torch.manual_seed(0)
    model = ihvp.InfluenceModel(Adapted().to(device), losses, layers=["adapters.*"], progress=False)

    def batch(count: int) -> ihvp.Batch:
        x = torch.randn(count, positions, WIDTHS[0], device=device)
        return model.batch((x, torch.randint(CLASSES, (count, positions), device=device)))

    train, own = batch(EXAMPLES), ihvp.IdentityIHVP(model).queries(batch(QUERIES))

    def scored() -> Tensor:
        scores = BatchScores(model, {"": own}, train, 0)
        capture(model, train, scores)
        return scores.totals()[""]

    def loop() -> Tensor:
        with one_by_one():
            return scored()

    def waited(f: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            result = f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        return call

    check(f"scores of {len(model.layers)} layers, {positions} positions", relative_error(scored(), loop()), 1e-5)
    runs = {"grouped": waited(scored), "loop": waited(loop), "capture": waited(lambda: capture(model, train, ignore))}
    times = race(runs, {name: once(call)[1] for name, call in runs.items()}, QUICK if quick else FULL)
    record = {
        "bench": "small layers",
        "device": str(device),
        "layers": len(model.layers),
        "positions": positions,
        "times": times,
        "ratio": times["loop"].median / times["grouped"].median,
    }
    report([record])
    write(output, [record])


def ignore(*tokens: object) -> None:
    """A sink that takes nothing."""
