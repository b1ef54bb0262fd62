"""Wrong models, batches and losses: the exception names the argument or the layer, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ihvp import EKFACIHVP, Batch
from nets import cross_entropy
from sound_problem import Case, N, check, loader, model, scores_of, sequences, x, y
from torch import Tensor, nn

# --- InfluenceModel ----------------------------------------------------------------------------------------------


class Halves(nn.Module):
    """Two layers that share a weight but not a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight


def embedded() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3))


MODELS: dict[str, Case] = {
    "net": (lambda: model("net"), TypeError, r"^net must be a torch\.nn\.Module, got str"),
    "loss_fn": (lambda: model(loss_fn=3), TypeError, r"^loss_fn must be callable, got int"),
    "process_batch": (lambda: model(process_batch=3), TypeError, r"process_batch must be callable, got int"),
    "sample_targets": (lambda: model(sample_targets=3), TypeError, r"sample_targets must be callable, got int"),
    "unsupported layer": (
        lambda: model(embedded()),
        TypeError,
        r"'0' \(Embedding\).*Supported types: Linear.*layers=\['1'\].*ihvp/layers",
    ),
    "unsupported layer asked for": (lambda: model(embedded(), layers=["*"]), TypeError, r"'0' \(Embedding\)"),
    "a name that does not exist": (
        lambda: model(layers=["0", "head"]),
        ValueError,
        r"^layers: no module of name or pattern 'head'; the net has '0', '2'",
    ),
    "a pattern without a match": (lambda: model(layers=["blocks.*"]), ValueError, r"pattern 'blocks\.\*'.*'0', '2'"),
    "a type without a match": (lambda: model(layers=[nn.Conv2d]), ValueError, r"no module of type Conv2d.*'0', '2'"),
    "a module without parameters": (lambda: model(layers=["1"]), ValueError, r"no module of name or pattern '1'"),
    "no layers": (lambda: model(layers=[]), ValueError, r"^layers"),
    "a string for a list of names": (lambda: model(layers="0"), TypeError, r"^layers must be .*(sequence|list).*'0'"),
    "a type for a list of types": (lambda: model(layers=nn.Linear), TypeError, r"^layers must be .*(sequence|list)"),
    "a number for a name": (lambda: model(layers=[3]), TypeError, r"^layers must .*names.*types.*3"),
    "no parameters": (lambda: model(nn.Tanh()), ValueError, r"no module with parameters"),
    "start_layer": (
        lambda: model(start_layer="head"),
        ValueError,
        r"^start_layer 'head' is not a tracked layer; they are '0', '2'",
    ),
    "last_layer": (lambda: model(last_layer="1"), ValueError, r"^last_layer '1' is not a tracked layer"),
    "start_layer out of range": (lambda: model(start_layer=2), ValueError, r"^start_layer must be from -2 to 1.*got 2"),
    "last_layer out of range": (lambda: model(last_layer=-3), ValueError, r"^last_layer must be from -2 to 1.*got -3"),
    "start_layer of another type": (lambda: model(start_layer=0.5), TypeError, r"start_layer.*0\.5"),
    "start after last": (
        lambda: model(start_layer="2", last_layer=0),
        ValueError,
        r"start_layer '2' comes after last_layer '0'",
    ),
    "layers that share a part": (lambda: model(Halves()), TypeError, r"'one' and 'two' share a parameter"),
    "one of two layers that share": (
        lambda: model(nn.ModuleList([layer := nn.Linear(4, 4), tied(layer)]), layers=["0"]),
        TypeError,
        r"'0' and '1' share a parameter",
    ),
}


def tied(layer: nn.Linear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.weight, other.bias = layer.weight, layer.bias
    return other


# --- Batch and what a loader yields ------------------------------------------------------------------------------


BATCHES: dict[str, Case] = {
    "mask of one dimension": (
        lambda: sequences(mask=torch.ones(N)),
        ValueError,
        r"^mask must be \(N,T\) with N=6, got \(6,\)",
    ),
    "mask of other examples": (
        lambda: sequences(mask=torch.ones(4, 4)),
        ValueError,
        r"^mask must be \(N,T\) with N=6, got \(4, 4\)",
    ),
    "mask of weights": (lambda: sequences(mask=torch.full((N, 4), 0.5)), ValueError, r"^mask must hold only 0 and 1"),
    "mask of a list": (lambda: sequences(mask=[[1, 0, 0, 0]] * N), TypeError, r"mask must be .*[Tt]ensor.*list"),
    "weights": (
        lambda: sequences(weights=torch.ones(N, 4)),
        ValueError,
        r"^weights must be \(N,\) = \(6,\), got \(6, 4\)",
    ),
    "weights of a list": (lambda: sequences(weights=[1.0] * N), TypeError, r"weights must be .*[Tt]ensor.*list"),
    "a tensor for args": (lambda: Batch(args=x, targets=y), TypeError, r"args must be a tuple.*Tensor"),
    "no tensor": (
        lambda: Batch(args=(3,)),
        ValueError,
        r"batch must hold a tensor whose first dimension is the example",
    ),
    "a triple": (
        lambda: model().batch((x, y, y)),
        TypeError,
        r"pair \(inputs, targets\) or an ihvp\.Batch, got tuple of length 3; process_batch",
    ),
    "a tensor": (lambda: model().batch(x), TypeError, r"pair \(inputs, targets\) or an ihvp\.Batch, got Tensor"),
    "a dict": (lambda: model().batch({"x": x}), TypeError, r"pair .*got dict; process_batch"),
}


# --- the loss and the capture of a batch -------------------------------------------------------------------------


class Reshaped(nn.Module):
    """A layer whose input has all positions in its first dimension, or half as many positions as the mask."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.inner = shape, nn.Linear(shape[-1], shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(self.shape)).reshape(x.shape)


def broken_at(*examples: int) -> Callable[[Tensor, Tensor], Tensor]:
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        bad = torch.isin(torch.arange(len(targets)), torch.tensor(examples))
        return torch.where(bad, torch.nan, cross_entropy(outputs, targets))

    return loss_fn


PER_EXAMPLE = r"^loss_fn must return one loss per example \(N,\) or per position \(N,T\) with N=6, got "


CAPTURES: dict[str, Case] = {
    "a reduced loss": (
        lambda: scores_of((x, y), loss_fn=nn.CrossEntropyLoss()),
        ValueError,
        PER_EXAMPLE + r'a scalar; .*reduction="none"',
    ),
    "a loss of other examples": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: outputs.sum(0)),
        ValueError,
        PER_EXAMPLE + r"\(3,\)",
    ),
    "a loss of three dimensions": (
        lambda: scores_of(sequences(), loss_fn=lambda outputs, targets: outputs),
        ValueError,
        PER_EXAMPLE + r"\(6, 4, 3\)",
    ),
    "a loss that is no tensor": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: 0.5),
        TypeError,
        r"^loss_fn must return a tensor, got float",
    ),
    "a loss that is not finite": (
        lambda: scores_of((x, y), loss_fn=broken_at(1, 4)),
        FloatingPointError,
        r"loss of batch 0 is not finite at examples \[1, 4\]",
    ),
    "a mask of other positions than the loss": (
        lambda: scores_of(sequences(mask=torch.ones(N, 3))),
        ValueError,
        r"^mask must be \(N,T\) = \(6, 4\) as the loss, got \(6, 3\)",
    ),
    "a mask of other positions than a layer": (
        lambda: scores_of(
            sequences(mask=torch.ones(N, 4)), Reshaped((N, 2, 8)), lambda outputs, targets: outputs.sum(2)
        ),
        ValueError,
        r"^mask must be \(N,T\) with T=2.* layer 'inner', got \(6, 4\)",
    ),
    "examples that are not the first dimension": (
        lambda: scores_of(sequences(), Reshaped((N * 4, 4)), lambda outputs, targets: outputs.sum((1, 2))),
        ValueError,
        r"layer 'inner' got an input of shape \(24, 4\).* N=6.*first dimension must be the example",
    ),
    "no layer reaches the loss": (
        lambda: scores_of((x, y), loss_fn=lambda outputs, targets: torch.ones(N)),
        ValueError,
        r"no tracked layer reaches the loss; tracked: '0', '2'",
    ),
}


CASES = {
    f"{what}: {name}": case
    for what, cases in {"model": MODELS, "batch": BATCHES, "capture": CAPTURES}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_input(name: str) -> None:
    check(*CASES[name])


def test_a_model_that_fails_says_why() -> None:
    """An exception of the user's own code comes through as it is."""

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        raise KeyError("labels")

    check(lambda: EKFACIHVP(model(loss_fn=loss_fn), loader), KeyError, r"labels")
