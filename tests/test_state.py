"""What a fit leaves: its state, its files, and the earlier one when it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ihvp
import ihvp.methods.base
import pytest
import torch
from ihvp import EKFACIHVP, Batch, InfluenceModel
from ihvp.methods import kronecker
from method_cases import DAMPING, FITTED, SAMPLING, same
from nets import F32, METHODS, assert_near, batches, cross_entropy, plain, random_vectors, tokens
from torch import Tensor, nn


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_object_solves_bitwise_the_same(method: str, tmp_path: Path) -> None:
    data, own = tokens(), METHODS[method]
    model = data.model()
    sampled = {"fisher": "sampled", "seed": 3} if method in SAMPLING else {}
    curvature = own(model, batches(data.train, 8), damping=0.25, **sampled)
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    assert os.listdir(tmp_path) == [path.name]
    loaded = ihvp.load(path, model)
    assert type(loaded) is own.cls and loaded.is_fitted
    V = random_vectors(model)
    assert same(loaded.solve(V), curvature.solve(V))
    assert same(loaded.multiply(V), curvature.multiply(V))
    assert same(loaded.compute_ihvp(data.tests), curvature.compute_ihvp(data.tests))
    assert same(loaded.state_dict(), curvature.state_dict())
    assert loaded._config() == curvature._config()


class Siblings(nn.Module):
    """Three layers that read one input, and one whose output gradients are those of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 3) for _ in range(3))
        self.single = nn.Linear(1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) * torch.tanh(self.k(x)) + self.v(x) + self.single(x[:, :1])


@pytest.mark.parametrize("method", ("kfac none", "ekfac"))
def test_equal_moments_are_diagonalised_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = InfluenceModel(Siblings(), cross_entropy, progress=False)
    data = torch.randn(9, 4), torch.randint(3, (9,))
    names: list[str] = []
    plainly = kronecker.symmetric_eigen

    def counted(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
        names.append(what)
        return plainly(matrix, what)

    monkeypatch.setattr(kronecker, "symmetric_eigen", counted)
    curvature = METHODS[method](model, [data])
    assert len(names) == 5  # A of q, k and v, A of single; G of q, of k, and of v and single
    for name, (U_A, U_G) in curvature.evecs.items():
        A, G = curvature.kfac_blocks[name]
        for U, M in ((U_A.double(), A), (U_G.double(), G)):
            assert_near(U @ (U.T @ M @ U).diagonal().diag() @ U.T, M, 1e-5)
    curvature.save(tmp_path / "file")
    assert same(ihvp.load(tmp_path / "file", model).state_dict(), curvature.state_dict())


def test_a_bare_layer_as_net_can_be_saved(tmp_path: Path) -> None:
    model = InfluenceModel(nn.Linear(4, 3), cross_entropy, progress=False)
    curvature = EKFACIHVP(model, [(torch.randn(9, 4), torch.randint(3, (9,)))])
    curvature.save(str(tmp_path / "file"))
    assert same(ihvp.load(str(tmp_path / "file"), model).state_dict(), curvature.state_dict())


def test_a_loaded_fit_can_be_replaced_by_another(tmp_path: Path) -> None:
    data = plain()
    model = data.model()
    EKFACIHVP(model, batches(data.train, 8), damping=DAMPING).save(tmp_path / "file")
    loaded = ihvp.load(tmp_path / "file", model)
    loaded.fit(data.tests)
    assert same(loaded.state_dict(), EKFACIHVP(model, data.tests).state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_a_file_can_be_loaded_for_a_model_of_another_dtype(method: str, tmp_path: Path) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8), damping=DAMPING)
    want = curvature.solve(random_vectors(model))
    curvature.save(tmp_path / "file")
    data.net.float()
    for name, x in ihvp.load(tmp_path / "file", model).solve(random_vectors(model)).items():
        assert x.dtype == F32
        assert_near(x, want[name])


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[EKFACIHVP, Path]]:
    data = plain()
    curvature = EKFACIHVP(data.model(), batches(data.train, 8))
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    yield curvature, path


FAILING = {"writing": (ihvp.methods.base, "save_file"), "moving into place": (os, "replace")}


@pytest.mark.parametrize("step", FAILING)
def test_a_save_that_fails_leaves_the_old_file_and_no_other(
    step: str, saved: tuple[EKFACIHVP, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    curvature, path = saved
    before = path.read_bytes()

    def fails(first: Any, second: Any, **options: Any) -> None:
        if step == "writing":
            Path(second).write_bytes(b"half of it")
        raise OSError("no space left on device")

    place, name = FAILING[step]
    monkeypatch.setattr(place, name, fails)
    with pytest.raises(OSError, match="no space left"):
        curvature.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_saved_file_can_be_read_by_whom_the_umask_allows(saved: tuple[EKFACIHVP, Path]) -> None:
    _, path = saved
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


WRONG_STATES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda state: {},
    "a tensor less": lambda state: dict(list(state.items())[1:]),
    "a tensor more": lambda state: {**state, "other": torch.zeros(3)},
    "another shape": lambda state: {**state, next(iter(state)): torch.zeros(7, 5)},
    "another layer": lambda state: {f"other/{name}": x for name, x in state.items()},
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
@pytest.mark.parametrize("method", FITTED)
def test_a_wrong_state_is_refused_and_changes_nothing(method: str, wrong: str) -> None:
    data, own = plain(), METHODS[method]
    model = data.model()
    curvature = own(model, batches(data.train, 8))
    before = {name: x.clone() for name, x in curvature.state_dict().items()}
    with pytest.raises(ValueError, match=own.cls.__name__):
        curvature.load_state_dict(WRONG_STATES[wrong](before))
    assert same(curvature.state_dict(), before)


def test_a_state_that_is_taken_over_is_copied() -> None:
    data = plain()
    model = data.model()
    for method in FITTED:
        curvature, other = METHODS[method](model, [data.train]), METHODS[method](model)
        state = {name: x.clone() for name, x in curvature.state_dict().items()}
        other.load_state_dict(state)
        for x in state.values():
            x.zero_()
        assert same(other.state_dict(), curvature.state_dict())


@pytest.mark.parametrize("method", FITTED)
def test_a_new_fit_forgets_the_old_one(method: str) -> None:
    """Also what a solve keeps for the next one."""
    data = plain()
    model = data.model()
    V = random_vectors(model)
    curvature = METHODS[method](model, [data.train], damping=DAMPING)
    old = curvature.solve(V)
    again = curvature.fit(data.tests).solve(V)
    assert same(again, METHODS[method](model, data.tests, damping=DAMPING).solve(V))
    assert not same(again, old)


class Failing:
    """A loader that fails in its last batch, in the given pass."""

    def __init__(self, data: list[Batch], at: int) -> None:
        self.data, self.at, self.passes = data, at, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        yield from self.data[:-1]
        if self.passes >= self.at:
            raise OSError("the disk is gone")
        yield self.data[-1]


@pytest.mark.parametrize(("method", "at"), [*((name, 1) for name in FITTED), ("ekfac", 2)])
def test_a_fit_that_fails_leaves_the_earlier_one(method: str, at: int) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8))
    before = {name: x.clone() for name, x in curvature.state_dict().items()}
    with pytest.raises(OSError, match="the disk is gone"):
        curvature.fit(Failing(list(data.tests), at))
    assert same(curvature.state_dict(), before)
    fresh = METHODS[method](model)
    with pytest.raises(OSError, match="the disk is gone"):
        fresh.fit(Failing(list(data.tests), at))
    assert not fresh.is_fitted
