"""The models and data of the pipeline bench, the same for every library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """`layers`: the names of the layers that every library tracks. The loss is summed over positions."""

    name: str
    title: str
    net: nn.Module
    layers: list[str]
    train: Pair
    queries: Pair
    batch: int

    @property
    def batches(self) -> list[Pair]:
        return list(zip(*(x.split(self.batch) for x in self.train), strict=True))


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropies: one an example, or one a position for logits (N,T,classes)."""
    return F.cross_entropy(outputs.movedim(-1, 1), targets, reduction="none")


# --- an MLP ----------------------------------------------------------------------------------------------------

SIZES = (784, 512, 512, 512, 10)


def mlp() -> Setting:
    """Initial weights, Gaussian inputs, labels of a random linear teacher: 2,048 examples and 64 queries."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for inputs, outputs in pairwise(SIZES):
        net.append(nn.Linear(inputs, outputs)).append(nn.ReLU())
    del net[-1]
    teacher = torch.randn(SIZES[0], SIZES[-1])
    x, queries = torch.randn(2048, SIZES[0]), torch.randn(64, SIZES[0])
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    labels = ((x @ teacher).argmax(1), (queries @ teacher).argmax(1))
    title = "MLP " + "-".join(map(str, SIZES))
    return Setting("mlp", title, net, layers, (x, labels[0]), (queries, labels[1]), 256)


# --- a transformer ---------------------------------------------------------------------------------------------

WIDTH, HEADS, DEPTH, POSITIONS, VOCABULARY = 256, 4, 4, 128, 512


class Block(nn.Module):
    """A pre-norm transformer block; the queries, keys, values and output of the attention are linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> list[int]:
    """The help topics of Python itself as token numbers: bytes, the most frequent pairs of them as one token."""
    data = "\n".join(topics.topics[name] for name in sorted(topics.topics)).encode()
    pairs = torch.tensor(list(data), dtype=torch.int64)
    counts = torch.bincount(pairs[:-1] * 256 + pairs[1:], minlength=256 * 256)
    frequent = counts.sort(descending=True, stable=True).indices[: VOCABULARY - 256].tolist()
    number = {pair: 256 + rank for rank, pair in enumerate(frequent)}
    ids, at = [], 0
    while at < len(data):
        pair = number.get(data[at] * 256 + data[at + 1]) if at + 1 < len(data) else None
        ids.append(data[at] if pair is None else pair)
        at += 1 if pair is None else 2
    return ids


def transformer() -> Setting:
    """Initial weights; 256 sequences of 128 tokens of the text and 16 queries, to predict the next token."""
    torch.manual_seed(0)
    net = Transformer().eval()
    sequences, queries = 256, 16
    needed = (sequences + queries) * POSITIONS + 1
    ids = torch.tensor(text()[:needed])
    if len(ids) < needed:
        raise SystemExit(f"the text must have {needed} tokens, got {len(ids)}")
    inputs, targets = ids[:-1].view(-1, POSITIONS), ids[1:].view(-1, POSITIONS)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    title = f"transformer, {DEPTH} layers, d={WIDTH}, T={POSITIONS}, on Python's help topics"
    train, held_out = ((inputs[part], targets[part]) for part in (slice(sequences), slice(sequences, None)))
    return Setting("transformer", title, net, layers, train, held_out, 32)


# --- a convolutional net -----------------------------------------------------------------------------------------

CHANNELS, SIDE, CLASSES = (3, 32, 64, 128, 128), 32, 10


def cnn() -> Setting:
    """Initial weights, Gaussian images, labels of a random linear teacher: 512 examples and 16 queries."""
    torch.manual_seed(0)
    net = nn.Sequential()
    for i, (inputs, outputs) in enumerate(pairwise(CHANNELS)):
        stride = 2 if i in (1, 2) else 1
        net.append(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)).append(nn.ReLU())
    net.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(CHANNELS[-1], CLASSES))
    teacher = torch.randn(CHANNELS[0] * SIDE * SIDE, CLASSES)
    x, queries = (torch.randn(count, CHANNELS[0], SIDE, SIDE) for count in (512, 16))
    labels = [(own.flatten(1) @ teacher).argmax(1) for own in (x, queries)]
    layers = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    title = f"{len(CHANNELS) - 1} convolutions 3x3 of {'-'.join(map(str, CHANNELS))} channels, {SIDE}x{SIDE} images"
    return Setting("cnn", title, net, layers, (x, labels[0]), (queries, labels[1]), 64)


SETTINGS: dict[str, Callable[[], Setting]] = {"mlp": mlp, "transformer": transformer, "cnn": cnn}
