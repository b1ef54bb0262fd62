"""fisher="sampled": targets drawn from the model's own predictive distribution."""

from __future__ import annotations

import pytest
import torch
from ihvp import EKFACIHVP, Batch, FisherIHVP, InfluenceModel
from ihvp.model import draw_classes
from method_cases import DAMPING, SAMPLING, assert_near_each
from nets import (
    F64,
    METHODS,
    assert_near,
    batches,
    cross_entropy,
    flat,
    gauss_newton,
    plain,
    random_vectors,
    squared_error,
    tokens,
)
from torch import Tensor, nn


@pytest.mark.parametrize("method", ["fisher", "kfac none", "ekfac"])
def test_sampled_fisher_converges_to_the_true_one(method: str) -> None:
    """Softmax regression: F = mean_n (diag(p_n) - p_n p_n^T) (x) x_n x_n^T, whatever the targets of the data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3)).double()
    model = InfluenceModel(net, cross_entropy, progress=False)
    x, copies = torch.randn(1 if "kfac" in method else 5, 3, dtype=F64), 4000
    p = net(x).softmax(1).detach()
    written_out = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    true = sum(
        torch.kron(q.diag() - torch.outer(q, q), torch.outer(z, z)) for q, z in zip(p, written_out, strict=True)
    ) / len(x)
    data = Batch(args=(x.repeat(copies, 1),), targets=torch.zeros(copies * len(x), dtype=torch.long))
    curvature = METHODS[method](model, batches(data, 2000), fisher="sampled", damping=DAMPING)
    if method == "ekfac":
        Q = torch.kron(*reversed(curvature.evecs["0"]))
        assert_near(curvature.evals["0"].flatten(), (Q.T @ true @ Q).diagonal(), 0.03)
    else:
        eye = {"0": torch.eye(len(true), dtype=F64).view(-1, 3, 4)}
        assert_near(flat(curvature.multiply(eye)), true, 0.03)
    empirical = METHODS[method](model, batches(data, 2000), damping=DAMPING)
    assert float((flat(empirical.multiply(random_vectors(model))) - flat(random_vectors(model)) @ true).norm()) > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_both_passes_of_ekfac_draw_the_same_targets(seed: int) -> None:
    """For one example the eigenvalues are then the products of those of G and A, whatever was drawn."""
    data = plain(N=1)
    curvature = EKFACIHVP(data.model(), [data.train], fisher="sampled", seed=seed)
    for name, (A, G) in curvature.kfac_blocks.items():
        assert_near(curvature.evals[name], torch.outer(torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(A)))


LAYOUTS = {
    "(N,C)": ((400,), lambda logits: logits),
    "(N,T,C)": ((100, 4), lambda logits: logits),
    "(N,C,T)": ((100, 4), lambda logits: logits.movedim(-1, 1)),
    "an object with logits": ((100, 4), lambda logits: type("Output", (), {"logits": logits})()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_classes_follow_the_softmax_over_classes_and_ignored_ones_stay(layout: str) -> None:
    shape, laid_out = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.6, 0.3], dtype=F64)
    targets = torch.randint(3, shape, generator=generator)
    targets[0] = -100
    drawn = torch.stack([draw_classes(laid_out(p.log().expand(*shape, 3)), targets, generator) for _ in range(50)])
    assert drawn.dtype == targets.dtype
    assert (drawn[:, 0] == -100).all()
    counts = drawn[:, 1:].flatten().bincount(minlength=3)
    assert_near(counts / counts.sum(), p, 0.02)


@pytest.mark.parametrize("method", SAMPLING)
def test_ignored_targets_contribute_nothing_to_a_sampled_fisher(method: str) -> None:
    data = tokens(40)
    model = data.model()
    V = random_vectors(model)
    ignored = torch.where(data.train.mask, data.train.targets, -100)
    marked = Batch(args=data.train.args, targets=ignored, mask=data.train.mask)
    curvature = METHODS[method](model, [data.train], fisher="sampled")
    assert_near_each(METHODS[method](model, [marked], fisher="sampled").multiply(V), curvature.multiply(V))


def test_targets_may_be_drawn_by_the_user() -> None:
    """Squared error is the loss of a unit normal distribution: its true Fisher matrix is Gauss-Newton's.

    What is drawn is a constant, even where it was made of outputs that autograd follows.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2)).double()

    def normal(outputs: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        return outputs + torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)

    model = InfluenceModel(net, squared_error, sample_targets=normal, progress=False)
    data = Batch(args=(torch.randn(5, 3, dtype=F64).repeat(4000, 1),), targets=torch.zeros(20000, 2, dtype=F64))
    curvature = FisherIHVP(model, batches(data, 4000), fisher="sampled")
    eye = {"0": torch.eye(8, dtype=F64).view(8, 2, 4)}
    few = Batch(args=(data.args[0][:5],), targets=data.targets[:5])
    assert_near(flat(curvature.multiply(eye)), gauss_newton(model, few), 0.03)
