"""How good the scores are: at finding wrong labels, and against exact ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from ihvp.calculators import FirstOrderInfluenceCalculator
from ihvp.demo.digits import Digits, influence_model
from ihvp.methods import EKFACIHVP, IHVP, KFACIHVP, DiagonalIHVP, ExactIHVP, FisherIHVP, IdentityIHVP

INSPECTED = 0.1  # share of the training data looked through for wrong labels


@dataclass(frozen=True)
class Detection:
    """How well scores rank flipped labels first."""

    auc: float
    recall: float


def detection(scores: Tensor, flipped: Tensor) -> Detection:
    """ROC AUC of the scores, and the share of flipped labels among the highest tenth."""
    first = scores.argsort(descending=True)[: round(INSPECTED * len(scores))]
    return Detection(
        auc=float(roc_auc_score(flipped.numpy(), scores.numpy())),
        recall=float(flipped[first].sum() / flipped.sum()),
    )


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
