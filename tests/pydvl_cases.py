"""What is asked of pyDVL and of its signatures over ihvp alike: a case takes either module and gives tensors.

    PYTHONPATH=. python tests/pydvl_cases.py        writes pyDVL 0.10.0's answers to tests/pydvl.json

Where pyDVL 0.10.0 strays from its documentation the cases go round it. Batches are of one size, since its Hessian
products weight batches alike. Its harmonic mean weights them by the number of systems that are solved at once, so it is
asked for one at a time. Its Gauss-Newton matrix is the sum of g g^T over p times the number of batches but the first,
which is the mean for two batches of p examples together. LiSSA gets all the data in one batch: it draws one a step.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.libraries.pydvl_names import pydvl_names

COMMAND = "PYTHONPATH=. python tests/pydvl_cases.py"
RECORD = Path(__file__).with_name("pydvl.json")
FEATURES, HIDDEN, CLASSES = 5, 4, 3
N, QUERIES, BATCH = 12, 3, 4
P = (FEATURES + 1) * HIDDEN + (HIDDEN + 1) * CLASSES
REGULARIZATION = 1.0  # above the Hessian's negative eigenvalues
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12, "regularization": REGULARIZATION}


def waves(*shape: int, step: float, dtype: torch.dtype) -> Tensor:
    """Numbers in (-1, 1) that no generator and no version changes."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * step).sin().view(shape).to(dtype)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = {"hidden": nn.Linear(FEATURES, HIDDEN), "tanh": nn.Tanh(), "head": nn.Linear(HIDDEN, CLASSES)}
    made = nn.Sequential(OrderedDict(layers)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(waves(*p.shape, step=1.7 + i, dtype=dtype))
    return made


def pair(count: int, step: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return waves(count, FEATURES, step=step, dtype=dtype), torch.arange(count) * 7 % 5 % CLASSES


TRAIN, TEST = pair(N, 2.3), pair(QUERIES, 3.1)


def loader(batch_size: int = BATCH, dtype: torch.dtype = torch.float64, count: int = N) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*pair(count, 2.3, dtype)), batch_size=batch_size)


Answer = dict[str, Tensor]
Case = Callable[[Any], Answer]


def answers(influence: Any, train: tuple[Tensor, Tensor] = TRAIN, test: tuple[Tensor, Tensor] = TEST) -> Answer:
    """All that a fitted influence is asked for."""
    factors = influence.influence_factors(*test)
    return {
        "influences": influence.influences(*test, *train),
        "more test than training data": influence.influences(*train, *test),
        "the data itself": influence.influences(*test),
        "factors": factors,
        "from factors": influence.influences_from_factors(factors, *train),
    }


def one_by_one(influence: Any) -> Answer:
    tests, trains = ([(x[None], y[None]) for x, y in zip(*data, strict=True)] for data in (TEST, TRAIN))
    factors = [influence.influence_factors(*test) for test in tests]
    return {
        "influences": torch.cat([influence.influences(*test, *train) for test in tests for train in trains[:3]]),
        "factors": torch.cat(factors),
        "from factors": torch.cat([influence.influences_from_factors(own, *TRAIN) for own in factors]),
    }


def direct(api: Any) -> Answer:
    return answers(api.DirectInfluence(net(), F.cross_entropy, REGULARIZATION).fit(loader(7)))


def direct_gauss_newton(api: Any) -> Answer:
    mode = api.SecondOrderMode.GAUSS_NEWTON
    influence = api.DirectInfluence(net(), F.cross_entropy, 0.1, second_order_mode=mode)
    return answers(influence.fit(loader(P // 2 + 1, count=P)))


def direct_squared_error(api: Any) -> Answer:
    """A loss that is a mean over the outputs too."""
    x, target = TRAIN[0], waves(N, CLASSES, step=0.9, dtype=torch.float64)
    data = DataLoader(TensorDataset(x, target), batch_size=7)
    influence = api.DirectInfluence(net(), F.mse_loss, REGULARIZATION).fit(data)
    return answers(influence, (x, target), (TEST[0], target[:QUERIES]))


def direct_other_regularization(api: Any) -> Answer:
    influence = api.DirectInfluence(net(), F.cross_entropy, REGULARIZATION).fit(loader())
    return answers(influence.with_regularization(2.0))


def direct_perturbation(api: Any) -> Answer:
    influence = api.DirectInfluence(net(), F.cross_entropy, REGULARIZATION).fit(loader())
    mode = api.InfluenceMode.Perturbation
    factors = influence.influence_factors(*TEST)
    return {
        "influences": influence.influences(*TEST, *TRAIN, mode=mode),
        "from factors": influence.influences_from_factors(factors, *TRAIN, mode=mode),
    }


BLOCKS = {"a": ["hidden.weight"], "b": ["hidden.bias", "head.weight", "head.bias"]}


def blocks(structure: Callable[[Any], Any]) -> Case:
    def case(api: Any) -> Answer:
        influence = api.DirectInfluence(net(), F.cross_entropy, REGULARIZATION, structure(api)).fit(loader())
        factors = influence.influence_factors_by_block(*TEST)
        parts = {
            "influences": influence.influences_by_block(*TEST, *TRAIN),
            "factors": factors,
            "from factors": influence.influences_from_factors_by_block(factors, *TRAIN),
            "perturbation": influence.influences_by_block(*TEST, *TRAIN, mode=api.InfluenceMode.Perturbation),
        }
        by_block = {f"{what} of {block!r}": x for what, own in parts.items() for block, x in own.items()}
        return answers(influence) | by_block

    return case


def cg(api: Any) -> Answer:
    return answers(api.CgInfluence(net(), F.cross_entropy, **TIGHT).fit(loader()))


def cg_simultaneously(api: Any) -> Answer:
    return answers(api.CgInfluence(net(), F.cross_entropy, solve_simultaneously=True, **TIGHT).fit(loader()))


def cg_preconditioned(api: Any) -> Answer:
    own = api.NystroemPreconditioner(10)
    return answers(api.CgInfluence(net(), F.cross_entropy, preconditioner=own, **TIGHT).fit(loader()))


def lissa(api: Any) -> Answer:
    influence = api.LissaInfluence(net(), F.cross_entropy, REGULARIZATION, maxiter=3000, scale=2.0, rtol=1e-7)
    return answers(influence.fit(loader(N)))


def arnoldi(api: Any) -> Answer:
    return answers(api.ArnoldiInfluence(net(), F.cross_entropy, REGULARIZATION, rank=8, tol=1e-12).fit(loader()))


def arnoldi_woodbury(api: Any) -> Answer:
    influence = api.ArnoldiInfluence(net(), F.cross_entropy, REGULARIZATION, rank=8, tol=1e-12, use_woodbury=True)
    return answers(influence.fit(loader()))


def nystroem(api: Any) -> Answer:
    """The whole rank of a linear model's Hessian: there the sketch does not depend on the draw."""
    linear = nn.Linear(FEATURES, CLASSES).double()
    with torch.no_grad():
        for p in linear.parameters():
            p.copy_(waves(*p.shape, step=1.7, dtype=torch.float64))
    rank = (FEATURES + 1) * CLASSES
    return answers(api.NystroemSketchInfluence(nn.Sequential(linear), F.cross_entropy, 0.1, rank).fit(loader()))


def harmonic_mean(api: Any) -> Answer:
    return one_by_one(api.InverseHarmonicMeanInfluence(net(), F.cross_entropy, 0.1).fit(loader()))


def ekfac(update_diagonal: bool) -> Case:
    """In float32, which is all that pyDVL's has."""

    def case(api: Any) -> Answer:
        f32 = torch.float32
        influence = api.EkfacInfluence(net(f32), update_diagonal, hessian_regularization=0.1)
        influence.fit(loader(7, f32))
        train, test = pair(N, 2.3, f32), pair(QUERIES, 3.1, f32)
        by_layer = {
            f"influences of {layer}": own for layer, own in influence.influences_by_layer(*test, *train).items()
        }
        explored = {
            f"{value} of {layer}": own
            for value, layers in influence.explore_hessian_regularization(*test, [0.1, 1.0]).items()
            for layer, own in layers.items()
        }
        mode = api.InfluenceMode.Perturbation
        return (
            answers(influence, train, test)
            | by_layer
            | explored
            | {"perturbation": influence.influences(*test, *train, mode=mode)}
        )

    return case


CASES: dict[str, Case] = {
    "direct": direct,
    "direct, Gauss-Newton": direct_gauss_newton,
    "direct, squared error": direct_squared_error,
    "direct, another regularization": direct_other_regularization,
    "direct, perturbation": direct_perturbation,
    "layer-wise": blocks(lambda api: api.BlockMode.LAYER_WISE),
    "parameter-wise": blocks(lambda api: api.BlockMode.PARAMETER_WISE),
    "custom blocks": blocks(lambda api: BLOCKS),
    "CG": cg,
    "CG, simultaneously": cg_simultaneously,
    "CG, Nystroem preconditioner": cg_preconditioned,
    "LiSSA": lissa,
    "Arnoldi": arnoldi,
    "Arnoldi, Woodbury": arnoldi_woodbury,
    "Nystroem": nystroem,
    "harmonic mean": harmonic_mean,
    "EKFAC": ekfac(False),
    "EKFAC, measured diagonal": ekfac(True),
}


def record() -> None:
    api = pydvl_names()
    found = {name: {what: rounded(x) for what, x in case(api).items()} for name, case in CASES.items()}
    head = {"command": COMMAND, "pydvl": importlib.metadata.version("pydvl")}
    RECORD.write_text(json.dumps(head | {"answers": found}) + "\n")


def rounded(x: Tensor) -> Any:
    """Nested lists of nine digits."""
    return json.loads(json.dumps(x.tolist()), parse_float=lambda text: float(f"{float(text):.8e}"))


if __name__ == "__main__":
    record()
