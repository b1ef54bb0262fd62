"""pyDVL's signatures give pyDVL's answers: recorded ones on every run, its own where it can be imported."""

from __future__ import annotations

import importlib.util
import inspect
import json
import warnings
from typing import Any

import ihvp
import pydvl_cases
import pytest
import torch
import torch.nn.functional as F
from ihvp.adapters import pydvl_api
from nets import assert_near
from pydvl_cases import CASES, REGULARIZATION, TEST, TRAIN, loader, net
from torch import nn

from bench.libraries.pydvl_names import pydvl_names

AGREE = 1e-4  # relative; in float64 all but LiSSA, which stops by another rule, come to 1e-8, the record's digits
RECORD = json.loads(pydvl_cases.RECORD.read_text())
SEVEN = [name for name in pydvl_api.__all__ if name.endswith("Influence")]

needs_pydvl = pytest.mark.skipif(importlib.util.find_spec("pydvl") is None, reason="pydvl is not installed")


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_recorded_of_pydvl(name: str) -> None:
    own, theirs = CASES[name](pydvl_api), RECORD["answers"][name]
    assert own.keys() == theirs.keys()
    for what, values in theirs.items():
        want = torch.tensor(values, dtype=torch.float64)
        assert_near(own[what].double(), want, AGREE)


@needs_pydvl
@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_pydvl(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = CASES[name](pydvl_names())
    for what, x in CASES[name](pydvl_api).items():
        assert_near(x, theirs[what].detach(), AGREE)


@needs_pydvl
@pytest.mark.parametrize("name", SEVEN)
def test_arguments_are_those_of_pydvl(name: str) -> None:
    own, theirs = (inspect.signature(getattr(api, name)).parameters for api in (pydvl_api, pydvl_names()))
    assert list(own) == list(theirs)
    for argument, parameter in theirs.items():
        want, got = parameter.default, own[argument].default
        assert getattr(got, "value", got) == getattr(want, "value", want), argument


def test_the_record_says_where_it_is_from() -> None:
    assert (RECORD["pydvl"], RECORD["command"]) == ("0.10.0", pydvl_cases.COMMAND)
    assert RECORD["answers"].keys() == CASES.keys()


# --- what is not in the answers ------------------------------------------------------------------------------------


def direct(**options: Any) -> pydvl_api.DirectInfluence:
    return pydvl_api.DirectInfluence(net(), F.cross_entropy, **options)


def test_fit_gives_the_object_itself() -> None:
    influence = direct(regularization=REGULARIZATION)
    assert not influence.is_fitted
    assert influence.fit(loader()) is influence and influence.is_fitted
    assert influence.n_parameters == pydvl_cases.P


@pytest.mark.parametrize("ask", ["influences", "influence_factors", "influences_by_block"])
def test_an_unfitted_influence_says_so(ask: str) -> None:
    with pytest.raises(RuntimeError, match="is not fitted"):
        getattr(direct(), ask)(*TEST)


def test_regularization_by_block() -> None:
    blocks = {"hidden": 0.7, "head": 0.3}
    mode = pydvl_api.BlockMode.LAYER_WISE
    own = direct(regularization=blocks, block_structure=mode).fit(loader())
    for block, value in blocks.items():
        alone = direct(regularization=value, block_structure=mode).fit(loader())
        assert torch.equal(own.influences_by_block(*TEST)[block], alone.influences_by_block(*TEST)[block])
    before = own.influences_by_block(*TEST)
    own.with_regularization({"hidden": 0.7, "head": 3.0})
    assert torch.equal(own.influences_by_block(*TEST)["hidden"], before["hidden"])
    assert not torch.allclose(own.influences_by_block(*TEST)["head"], before["head"])
    assert own.block_names == ["hidden", "head"]
    with pytest.raises(ValueError, match="blocks of 'hidden', 'head', got 'neck'"):
        own.with_regularization({"neck": 1.0})
    with pytest.raises(ValueError, match="not negative"):
        own.with_regularization(-1.0)


def test_a_block_left_out_has_no_regularization() -> None:
    influence = direct(regularization={"head": 0.3}, block_structure=pydvl_api.BlockMode.LAYER_WISE)
    assert influence._ihvp.damping == {"hidden": 0.0, "head": 0.3}


def test_cg_options_arrive() -> None:
    preconditioner = pydvl_api.JacobiPreconditioner(3)
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5, "maxiter": 7, "preconditioner": preconditioner}
    flags: dict[str, Any] = {"solve_simultaneously": True, "precompute_grad": True, "warn_on_max_iteration": False}
    own = pydvl_api.CgInfluence(net(), F.cross_entropy, 0.5, progress=True, **options, **flags)._ihvp
    assert isinstance(own, ihvp.CgIHVP) and own.model.progress
    assert (own.rtol, own.atol, own.maxiter, own.preconditioner) == (1e-3, 1e-5, 7, ihvp.JacobiPreconditioner(3))
    assert (own.krylov, own.on_failure, own.damping) == ("shared", "return", {"": 0.5})


def test_cg_warns_at_the_last_iteration_unless_told_not_to() -> None:
    for warn in (True, False):
        influence = pydvl_api.CgInfluence(net(), F.cross_entropy, 0.5, maxiter=1, warn_on_max_iteration=warn)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            influence.fit(loader()).influence_factors(*TEST)
        assert bool(caught) is warn


def test_jacobi_preconditioner_reaches_the_direct_solution() -> None:
    own = pydvl_api.CgInfluence(
        net(), F.cross_entropy, preconditioner=pydvl_api.JacobiPreconditioner(50), **pydvl_cases.TIGHT
    ).fit(loader())
    want = direct(regularization=REGULARIZATION).fit(loader())
    assert_near(own.influences(*TEST, *TRAIN), want.influences(*TEST, *TRAIN), 1e-7)


def test_frozen_layers_are_left_out() -> None:
    frozen = net()
    frozen.get_submodule("hidden").requires_grad_(False)
    for make in (
        lambda: pydvl_api.DirectInfluence(frozen, F.cross_entropy, REGULARIZATION),
        lambda: pydvl_api.EkfacInfluence(frozen, hessian_regularization=0.1),
    ):
        influence = make().fit(loader())
        head = sum(p.numel() for p in frozen.get_submodule("head").parameters())
        assert influence.influence_factors(*TEST).shape == (len(TEST[0]), head)
        assert not any(p.requires_grad for p in frozen.get_submodule("hidden").parameters())


def test_bad_input() -> None:
    fitted = direct(regularization=REGULARIZATION).fit(loader())
    with pytest.raises(ValueError, match="x and y must be given together, got x alone"):
        fitted.influences(*TEST, TRAIN[0])
    with pytest.raises(ValueError, match=r"factors must be \(n,p\) with p=39, got \(3, 38\)"):
        fitted.influences_from_factors(torch.zeros(3, 38), *TRAIN, mode=pydvl_api.InfluenceMode.Perturbation)
    with pytest.raises(ValueError, match=r"factors must be \(n,p\) with p=39, got \(3, 38\)"):
        fitted.influences_from_factors(torch.zeros(3, 38), *TRAIN)
    with pytest.raises(ValueError, match="factors must have the blocks '', got hidden"):
        fitted.influences_from_factors_by_block({"hidden": torch.zeros(3, 24)}, *TRAIN)
    with pytest.raises(ValueError, match="sideways"):
        fitted.influences(*TEST, mode="sideways")
    with pytest.raises(ValueError, match="ARPACK runs on the CPU"):
        pydvl_api.ArnoldiInfluence(net(), F.cross_entropy, eigen_computation_on_gpu=True)
    half = net()
    next(half.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"all be trainable or none, \['hidden.weight'\] are not"):
        pydvl_api.EkfacInfluence(half)
    with pytest.raises(ValueError, match=r"'hidden\.weight'"):
        pydvl_api.DirectInfluence(half, F.cross_entropy)
    with pytest.raises(torch.linalg.LinAlgError, match="positive damping"):
        pydvl_api.InverseHarmonicMeanInfluence(net(), F.cross_entropy, 0.0).fit(loader()).influences(*TEST)


def test_a_layer_without_bias() -> None:
    """pyDVL's EKFAC takes a bias for granted."""
    bare = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    influence = pydvl_api.EkfacInfluence(bare, True, hessian_regularization=0.1).fit(loader())
    factors = influence.influence_factors_by_layer(*TEST)
    assert {layer: x.shape[1] for layer, x in factors.items()} == {"0": 20, "2": 15}
    by_layer = influence.influences_from_factors_by_layer(factors, *TRAIN)
    assert_near(torch.stack(list(by_layer.values())).sum(0), influence.influences(*TEST, *TRAIN))


def test_changed_regularization_of_ekfac() -> None:
    influence = pydvl_api.EkfacInfluence(net(), True, hessian_regularization=0.1).fit(loader())
    explored = influence.explore_hessian_regularization(*TEST, [0.1, 1.0])
    for value in (0.1, 1.0):
        influence.hessian_regularization = value
        assert influence.hessian_regularization == value
        for layer, own in influence.influences_by_layer(*TEST).items():
            assert_near(explored[value][layer], own)


def test_ekfac_runs_the_net_once_for_both_passes_of_a_fit_and_keeps_nothing() -> None:
    own, runs = net(), []
    own.register_forward_hook(lambda *_: runs.append(1))
    influence = pydvl_api.EkfacInfluence(own, True, hessian_regularization=0.1).fit(loader())
    assert len(runs) == len(loader())
    cache = influence._curved.cache
    assert cache is not None and cache.used == 0
    with pytest.raises(ValueError, match="yielded no batch"):
        influence.fit([])
    assert cache.used == 0 and influence.is_fitted
