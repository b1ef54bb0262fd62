"""The digits with some wrong labels, and a network trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ihvp.model import InfluenceModel

CLASSES = 10
FLIPPED = 0.05  # share of the training labels
TEST = 360
BATCH = 64
Loader = list[tuple[Tensor, Tensor]]


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
