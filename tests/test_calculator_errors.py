"""Wrong arguments of the first-order calculator, by name."""

from __future__ import annotations

import pytest
import torch
from ihvp import EKFACIHVP, FirstOrderInfluenceCalculator, Order
from nets import F64, batches, tokens
from sound_problem import Case, N, V, calculator, check, ekfac, loader, model, own, scores_of, sequences, x, y

CALCULATORS: dict[str, Case] = {
    "curvature": (
        lambda: FirstOrderInfluenceCalculator(own, loader, "ekfac"),
        TypeError,
        r"^curvature must be an IHVP object, got str",
    ),
    "curvature of another model": (
        lambda: FirstOrderInfluenceCalculator(model(), loader, ekfac),
        ValueError,
        r"^curvature must be an IHVP object of this model",
    ),
    "sign": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, sign="+"),
        ValueError,
        r"^sign must be one of proponent, loss_change, got '\+'",
    ),
    "normalize": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, normalize="l2"),
        ValueError,
        r"^normalize must be False, True, 'theta' or 'loss', got 'l2'",
    ),
    "normalize by a number": (
        lambda: FirstOrderInfluenceCalculator(own, loader, ekfac, normalize=0),
        ValueError,
        r"^normalize must be False, True, 'theta' or 'loss', got 0",
    ),
    "no training data": (
        lambda: FirstOrderInfluenceCalculator(own, None, ekfac).scores(loader),
        ValueError,
        r"no training data: give a loader",
    ),
    "no training data to fit": (
        lambda: FirstOrderInfluenceCalculator(own, None, EKFACIHVP(own)),
        ValueError,
        r"no training data: give a loader",
    ),
    "k too large": (
        lambda: calculator.top_k(loader, k=7),
        ValueError,
        r"^k must be at most the number of training examples, 6, got 7",
    ),
    "k of zero": (lambda: calculator.top_k(loader, k=0), ValueError, r"^k must be a whole number of at least 1, got 0"),
    "k negative": (lambda: calculator.top_k(loader, k=-1), ValueError, r"^k must be .*got -1"),
    "k of a bool": (lambda: calculator.top_k(loader, k=True), ValueError, r"^k must be a whole number.*got True"),
    "k of a fraction": (lambda: calculator.top_k(loader, k=2.5), ValueError, r"^k must be a whole number.*got 2\.5"),
    "order": (
        lambda: calculator.top_k(loader, order="descending"),
        TypeError,
        r"^order must be an ihvp\.Order, got 'descending'",
    ),
    "k too large for the training data": (
        lambda: calculator.compute_top_k_from_training_dataset(k=7),
        ValueError,
        r"^k must be at most the number of training examples, 6, got 7",
    ),
    "k of zero of the training data": (
        lambda: calculator.compute_top_k_from_training_dataset(k=0),
        ValueError,
        r"^k must be a whole number of at least 1, got 0",
    ),
    "groups that are not as many": (
        lambda: list(calculator.estimate_influence_values_group([loader, loader], [loader])),
        ValueError,
        r"^train_groups and test_groups must be as many, got 2 and 1",
    ),
}


@pytest.mark.parametrize("name", CALCULATORS)
def test_wrong_input(name: str) -> None:
    check(*CALCULATORS[name])


def test_a_good_problem_raises_nothing() -> None:
    """The cases above fail for the reason they name: their data are sound."""
    assert scores_of((x, y)).shape == (N, N)
    assert scores_of(sequences(mask=torch.ones(N, 4))).isfinite().all()
    assert next(iter(batches(tokens().train, 3))).size == 3
    assert V["0"].dtype == torch.float32 and F64 is torch.float64
    assert len(list(calculator.top_k(loader, k=6, order=Order.ASCENDING))) == 1
