"""Wrong arguments of IHVP objects, by name."""

from __future__ import annotations

import pytest
import torch
from ihvp import EKFACIHVP, KFACIHVP, DiagonalIHVP, ExactIHVP, FisherIHVP, IdentityIHVP
from nets import chain, cross_entropy
from sound_problem import Case, N, V, check, ekfac, loader, model, own, sequences, x
from torch import Tensor, nn

METHOD_ARGUMENTS: dict[str, Case] = {
    "model": (
        lambda: EKFACIHVP(chain(4, 3), loader),
        TypeError,
        r"^model must be an ihvp\.InfluenceModel, got Sequential",
    ),
    "negative damping": (
        lambda: EKFACIHVP(own, damping=-1e-3),
        ValueError,
        r"^damping must be .*not negative, got -0\.001",
    ),
    "infinite damping": (lambda: KFACIHVP(own, damping=float("inf")), ValueError, r"^damping must be finite.*inf"),
    "damping that is no number": (
        lambda: FisherIHVP(own, damping=float("nan")),
        ValueError,
        r"^damping must be finite.*nan",
    ),
    "damping by another word": (
        lambda: EKFACIHVP(own, damping="mean"),
        TypeError,
        r'^damping must be a number or "auto".*mean',
    ),
    "damping of None": (lambda: DiagonalIHVP(own, damping=None), TypeError, r"^damping must be a number.*None"),
    "damping of a bool": (lambda: IdentityIHVP(own, damping=True), TypeError, r"^damping must be a number.*True"),
    "fisher": (
        lambda: EKFACIHVP(own, fisher="true"),
        ValueError,
        r"^fisher must be one of empirical, sampled, got 'true'",
    ),
    "split": (lambda: KFACIHVP(own, split="odd"), ValueError, r"^split must be one of pi, even, none, got 'odd'"),
    "curvature": (
        lambda: ExactIHVP(own, curvature="true"),
        ValueError,
        r"^curvature must be one of hessian, gauss_newton, fisher, got 'true'",
    ),
    "rcond": (lambda: ExactIHVP(own, rcond=1.5), ValueError, r"^rcond must be in \[0, 1\), got 1\.5"),
    "a loader and a train_hessian": (
        lambda: ExactIHVP(own, loader, train_hessian=torch.eye(own.nb_params)),
        ValueError,
        r"hessian_loader or train_hessian, not both",
    ),
    "train_hessian of another shape": (
        lambda: ExactIHVP(own, train_hessian=torch.eye(7)),
        ValueError,
        r"train_hessian.* must be \(43, 43\), got \(7, 7\)",
    ),
    "solve: a layer missing": (
        lambda: ekfac.solve({"0": V["0"]}),
        ValueError,
        r"^V must map every tracked layer to \(Q,O,I'\): '0', '2'; got '0'",
    ),
    "solve: a layer more": (
        lambda: ekfac.solve({**V, "head": V["0"]}),
        ValueError,
        r"every tracked layer.*got '0', '2', 'head'",
    ),
    "solve: a tensor": (lambda: ekfac.solve(V["0"]), ValueError, r"^V must map every tracked layer.*got Tensor"),
    "solve: another shape": (
        lambda: ekfac.solve({**V, "2": V["2"].mT}),
        ValueError,
        r"^V\['2'\] must be \(Q,O,I'\) with O=3, I'=6.*got \(4, 6, 3\)",
    ),
    "solve: no dimension Q": (
        lambda: ekfac.solve({k: v[0] for k, v in V.items()}),
        ValueError,
        r"V\['0'\] must be \(Q,O,I'\)",
    ),
    "solve: several Q": (
        lambda: ekfac.multiply({**V, "2": V["2"][:1]}),
        ValueError,
        r"must be \(Q,O,I'\).*one Q for all layers",
    ),
    "solve: negative damping": (
        lambda: ekfac.solve(V, damping=-1.0),
        ValueError,
        r"^damping must be .*not negative, got -1",
    ),
    "solve: one of several dampings": (
        lambda: ekfac.solve(V, damping=[1.0, -1.0]),
        ValueError,
        r"damping.*not negative, got -1",
    ),
    "solve: damping by another word": (
        lambda: ekfac.solve(V, damping="mean"),
        TypeError,
        r'damping must be a number or "auto"',
    ),
    "solve: damping of a tensor": (
        lambda: ekfac.solve(V, damping=torch.tensor(0.1)),
        TypeError,
        r"^damping must be .*number.*tensor\(0\.1",
    ),
    "vectors: none": (lambda: ekfac.compute_ihvp([], use_gradient=False), ValueError, r"loader yielded no vectors"),
    "vectors: another shape": (
        lambda: ekfac.compute_hvp([{"0": V["0"]}], use_gradient=False),
        ValueError,
        r"every tracked layer",
    ),
    "targets cannot be sampled": (
        lambda: EKFACIHVP(
            model(loss_fn=lambda outputs, targets: outputs.sum(1)), [(x, torch.rand(N, 3))], fisher="sampled"
        ),
        ValueError,
        r'fisher="sampled" knows integer targets with logits.*got.*sample_targets',
    ),
    "classes or positions": (
        lambda: KFACIHVP(model(chain(4, 4)), [sequences()], fisher="sampled"),
        ValueError,
        r"where C is not T, got outputs \(6, 4, 4\), targets \(6, 4\).*sample_targets",
    ),
    "gauss_newton of a dict": (
        lambda: ExactIHVP(
            model(Wrapped(), lambda outputs, targets: cross_entropy(outputs["logits"], targets)),
            loader,
            curvature="gauss_newton",
        ),
        TypeError,
        r'curvature="gauss_newton" needs a net that returns one tensor, got dict',
    ),
}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


@pytest.mark.parametrize("name", METHOD_ARGUMENTS)
def test_wrong_input(name: str) -> None:
    check(*METHOD_ARGUMENTS[name])
