"""Fits to parts of the data, merged, are the fit to all of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ihvp
import pytest
from ihvp import (
    EKFACIHVP,
    KFACIHVP,
    CgIHVP,
    ExactIHVP,
    FirstOrderInfluenceCalculator,
    IdentityIHVP,
    InfluenceModel,
    InverseHarmonicMeanIHVP,
)
from method_cases import DAMPING, SAMPLING, assert_near_each, same
from nets import METHODS, PROBLEMS, Method, assert_near, batches, cross_entropy, plain, random_vectors, rows, tokens
from torch import nn

OWN = {
    "harmonic mean": Method(InverseHarmonicMeanIHVP, METHODS["fisher"].F, {}),
    "datainf": Method(ihvp.DataInfIHVP, METHODS["fisher"].F, {}),
}
MERGED = ["identity", "diagonal", "kfac pi", "kfac none", "ekfac uncorrected", "fisher", "fisher by parameter", *OWN]
README = Path(__file__).parent.parent / "README.md"
PARTS = (slice(0, 12), slice(12, 13), slice(13, None))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", MERGED)
def test_parts_add_up(method: str, name: str, tmp_path: Path) -> None:
    """Also through files, for another size, and with the damping of the first."""
    data, own = PROBLEMS[name](), (METHODS | OWN)[method]
    model = data.model()
    whole = own(model, batches(data.train, 8), damping=DAMPING)
    first, *others = (own(model, [rows(data.train, at)], damping=DAMPING if at.start == 0 else 7.0) for at in PARTS)
    before = first.state_dict()
    for i, other in enumerate(others):
        other.save(tmp_path / str(i))
    merged = first.merge(*(ihvp.load(tmp_path / str(i), model) for i in range(len(others))))
    assert type(merged) is own.cls and merged.damping == DAMPING
    V = random_vectors(model)
    assert_near_each(merged.solve(V), whole.solve(V))
    assert_near_each(merged.multiply(V), whole.multiply(V))
    assert_near_each(merged.compute_ihvp(data.tests), whole.compute_ihvp(data.tests))
    assert same(first.state_dict(), before), "the parts are as they were"
    assert_near_each(first.merge(others[0].merge(others[1])).solve(V), whole.solve(V))


@pytest.mark.parametrize("name", PROBLEMS)
def test_ekfac_measured_on_parts_in_one_basis(name: str) -> None:
    """The two passes of a fit, each over parts of the data."""
    data = PROBLEMS[name]()
    model = data.model()
    parts = [[rows(data.train, at)] for at in PARTS]
    basis = KFACIHVP(model, parts[0]).merge(*(KFACIHVP(model, part) for part in parts[1:]))
    first, *others = (EKFACIHVP(model, damping="auto").fit(part, basis) for part in parts)
    merged = first.merge(*others)
    whole = EKFACIHVP(model, batches(data.train, 8), damping="auto")
    V = random_vectors(model)
    assert_near_each(merged.solve(V), whole.solve(V))
    scores, want = (
        FirstOrderInfluenceCalculator(model, [data.train], one).scores(data.tests) for one in (merged, whole)
    )
    assert_near(scores, want)
    for layer, (A, G) in merged.kfac_blocks.items():
        assert_near(A, whole.kfac_blocks[layer][0])
        assert_near(G, whole.kfac_blocks[layer][1])
    again = EKFACIHVP(model, damping="auto")
    again.load_state_dict(merged.state_dict())
    assert same(again.solve(V), merged.solve(V))


def test_the_readmes_way_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first and third line run in each process, the others once."""
    found = re.search(r"```python\n(ihvp\.KFACIHVP.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    factors, basis, diagonals, merged = found[1].splitlines()
    data = tokens()
    names: dict[str, Any] = {"ihvp": ihvp, "model": data.model(), "processes": len(PARTS)}
    monkeypatch.chdir(tmp_path)
    for each, once in ((factors, basis), (diagonals, merged)):
        for rank, at in enumerate(PARTS):
            exec(each, names | {"rank": rank, "part": [rows(data.train, at)], "basis": names.get("basis")})
        exec(once, names)
    whole = EKFACIHVP(names["model"], [data.train], damping="auto")
    V = random_vectors(names["model"])
    assert_near_each(names["curvature"].solve(V), whole.solve(V))


def test_a_basis_is_taken_as_it_is() -> None:
    """With its own data Lambda is that of a fit, and from an EKFAC object's too."""
    data = tokens()
    model, train = data.model(), batches(data.train, 8)
    whole = EKFACIHVP(model, train)
    for basis in (KFACIHVP(model, train), whole):
        assert same(EKFACIHVP(model).fit(train, basis).evals, whole.evals)
        plainly = EKFACIHVP(model, update_eigen=False).fit([], basis)
        assert same(plainly.evals, EKFACIHVP(model, train, update_eigen=False).evals)


def test_fisher_parts_that_keep_tokens_and_parts_that_sum() -> None:
    """Few examples, many, and both kinds together."""
    data = plain(90)
    model = data.model()
    p = model.nb_params
    V = random_vectors(model)
    for cuts in ((5, 10), (5, p + 4), (p + 1, 5), (p, p), (p - 3, p - 5)):
        whole = METHODS["fisher"](model, [rows(data.train, slice(0, sum(cuts)))], damping=DAMPING)
        one = METHODS["fisher"](model, [rows(data.train, slice(0, cuts[0]))], damping=DAMPING)
        other = METHODS["fisher"](model, [rows(data.train, slice(cuts[0], sum(cuts)))], damping=DAMPING)
        assert_near_each(one.merge(other).solve(V), whole.solve(V))
        assert one.merge(other).state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("method", [name for name in SAMPLING if name != "ekfac"])
def test_parts_of_a_sampled_fisher_have_seeds_of_their_own(method: str) -> None:
    data = tokens()
    model = data.model()
    parts = [METHODS[method](model, [data.train], damping=DAMPING, fisher="sampled", seed=seed) for seed in (1, 2)]
    merged = parts[0].merge(parts[1])
    V = random_vectors(model)
    mean = {name: (parts[0].multiply(V)[name] + parts[1].multiply(V)[name]) / 2 for name in V}
    if "kfac" not in method:
        assert_near_each(merged.multiply(V), mean)
    assert not same(merged.multiply(V), parts[0].multiply(V))


def test_one_alone_is_itself() -> None:
    data = tokens()
    curvature = EKFACIHVP(data.model(), [data.train])
    merged = curvature.merge()
    assert merged is not curvature and same(merged.state_dict(), curvature.state_dict())


# --- errors ------------------------------------------------------------------------------------------------------


def test_what_does_not_add_up_is_named() -> None:
    data = tokens()
    model, train = data.model(), [data.train]
    ekfac, kfac = EKFACIHVP(model, train), KFACIHVP(model, train)
    with pytest.raises(TypeError, match=r"others\[0\] must be of the class EKFACIHVP, got KFACIHVP"):
        ekfac.merge(kfac)
    with pytest.raises(RuntimeError, match="KFACIHVP is not fitted"):
        kfac.merge(KFACIHVP(model))
    with pytest.raises(RuntimeError, match="KFACIHVP is not fitted"):
        KFACIHVP(model).merge(kfac)
    with pytest.raises(ValueError, match=r"others\[1\] must have the arguments .*'pi'.* got .*'even'"):
        kfac.merge(kfac, KFACIHVP(model, train, split="even"))
    other = InfluenceModel(nn.Linear(4, 3).double(), cross_entropy, progress=False)
    with pytest.raises(ValueError, match=r"others\[0\] must have the layers .*'0': .* got \{'': \(3, 5\)\}"):
        kfac.merge(KFACIHVP(other, train))
    with pytest.raises(ValueError, match=r"layer '0': others\[0\] measured Lambda in another eigenbasis"):
        ekfac.merge(EKFACIHVP(model, [rows(data.train, slice(0, 9))]))
    for curvature in (ExactIHVP(model, train, 0.1), CgIHVP(model, train)):
        with pytest.raises(NotImplementedError, match=f"{type(curvature).__name__} cannot be merged"):
            curvature.merge(curvature)


@pytest.mark.parametrize(
    ("basis", "error", "match"),
    [
        (lambda model: "kfac", TypeError, "basis must be a KFACIHVP or EKFACIHVP, got str"),
        (IdentityIHVP, TypeError, "basis must be a KFACIHVP or EKFACIHVP, got IdentityIHVP"),
        (KFACIHVP, RuntimeError, "KFACIHVP is not fitted"),
    ],
)
def test_wrong_bases_are_named(basis: Any, error: type[Exception], match: str) -> None:
    data = tokens()
    model = data.model()
    curvature = EKFACIHVP(model, [data.train])
    before = curvature.state_dict()
    with pytest.raises(error, match=match):
        curvature.fit([data.train], basis(model))
    other = InfluenceModel(nn.Linear(4, 3).double(), cross_entropy, progress=False)
    with pytest.raises(ValueError, match=r"basis must have the layers \(O,I'\) .* got \{'': \(3, 5\)\}"):
        curvature.fit([data.train], KFACIHVP(other, [data.train]))
    assert same(curvature.state_dict(), before)
