"""Block structure: its names and columns, dampings by block, and what every method makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ihvp import FisherIHVP
from ihvp.methods.blocks import make_blocks
from nets import (
    F64,
    METHODS,
    PROBLEMS,
    assert_near,
    batches,
    fisher,
    flat,
    plain,
    pooled,
    random_vectors,
    within_blocks,
)

# --- the structure -----------------------------------------------------------------------------------------------


def test_named_structures() -> None:
    model = plain().model()
    assert make_blocks(model, "full") == {"full": {"0": slice(0, 5), "2": slice(0, 3)}}
    assert make_blocks(model, "layer") == {"0": {"0": slice(0, 5)}, "2": {"2": slice(0, 3)}}
    assert make_blocks(model, "parameter") == {
        "0.weight": {"0": slice(0, 4)},
        "0.bias": {"0": slice(4, 5)},
        "2.weight": {"2": slice(0, 3)},
    }


def test_custom_structures() -> None:
    model = plain().model()
    assert make_blocks(model, {"b": ["0.bias"], "w": ["2", "0.weight"]}) == {
        "b": {"0": slice(4, 5)},
        "w": {"2": slice(0, 3), "0": slice(0, 4)},
    }
    assert make_blocks(model, {"all": ["0.bias", "0.weight", "2.weight"]}) == {
        "all": {"0": slice(0, 5), "2": slice(0, 3)}
    }


WRONG: dict[str, tuple[Any, str]] = {
    "unknown name": ("layers", r"block_structure must be one of 'full', 'layer', 'parameter' or a mapping.*'layers'"),
    "another type": (["0", "2"], r"block_structure must be one of .*\['0', '2'\]"),
    "unknown parameter": ({"a": ["0", "2.bias"]}, r"block 'a': '2\.bias' is neither .*'0', '2', '0\.weight'"),
    "in none": ({"a": ["0.weight", "2"]}, r"'0\.bias' are in none"),
    "in two": ({"a": ["0"], "b": ["2", "0.bias"]}, r"'0\.bias' is in two blocks: 'a' and 'b'"),
    "empty": ({"a": ["0", "2"], "b": []}, r"block 'b' must list names .*got \[\]"),
    "a string for a list": ({"a": "0"}, r"block 'a' must list names .*got '0'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_structures_are_named(wrong: str) -> None:
    structure, match = WRONG[wrong]
    with pytest.raises(ValueError, match=match):
        make_blocks(plain().model(), structure)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_cover_every_column_once(method: str) -> None:
    model = pooled().model()
    blocks = METHODS[method](model).blocks
    for name, layer in model.layers.items():
        taken = [c for own in blocks.values() if name in own for c in range(own[name].start, own[name].stop)]
        assert sorted(taken) == list(range(layer.shape[1]))


# --- dampings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("method", METHODS)
def test_each_block_takes_its_own_damping(method: str, problem: str) -> None:
    data = PROBLEMS[problem]()
    model = data.model()
    curvature = METHODS[method](model, batches(data.train, 8))
    dampings: dict[str, Any] = {block: 0.2 * (i + 1) for i, block in enumerate(curvature.blocks)}
    V = random_vectors(model)
    got = curvature.solve(V, dampings)
    for block, own in curvature.blocks.items():
        for name, columns in own.items():
            want = curvature.solve(V, dampings[block])[name]
            assert_near(got[name][..., columns], want[..., columns])
    other = curvature.with_damping(dampings)
    assert other.damping == dampings and curvature.damping != dampings
    for name, x in other.solve(V).items():
        assert torch.equal(x, got[name])
    for name, x in curvature.solve(V, [0.3, dampings]).items():
        assert_near(x[1], got[name])


@pytest.mark.parametrize("method", METHODS)
def test_wrong_dampings_by_block_are_named(method: str) -> None:
    data = plain()
    model = data.model()
    curvature = METHODS[method](model, [data.train])
    whole = dict.fromkeys(curvature.blocks, 0.1)
    with pytest.raises(ValueError, match=r"damping must have a value for every block, .*, got 'other'"):
        curvature.with_damping({"other": 0.1})
    with pytest.raises(ValueError, match=r"damping must be finite and not negative, got -1"):
        curvature.solve(random_vectors(model), whole | {next(iter(whole)): -1.0})
    with pytest.raises(TypeError, match=r'damping must be a number or "auto", got None'):
        METHODS[method](model, damping=whole | {next(iter(whole)): None})


# --- the Fisher matrix by blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 5, 60], ids=["kernels", "kernels and matrices", "matrices"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_blocks_of_the_fisher_matrix_by_kernels_and_by_matrices(problem: str, N: int) -> None:
    """Each block by the smaller of its two systems, N x N or p_b x p_b; a copy of the state solves alike."""
    data = PROBLEMS[problem](N)
    model = data.model()
    own = FisherIHVP(model, batches(data.train, 2), 0.1, block_structure="parameter")
    F = within_blocks("parameter", fisher)(model, data.train)
    V = random_vectors(model)
    want = torch.linalg.solve(F + 0.1 * torch.eye(len(F), dtype=F64), flat(V).T).T
    assert_near(flat(own.multiply(V)), flat(V) @ F)
    assert_near(flat(own.solve(V)), want)
    other = FisherIHVP(model, damping=0.1, block_structure="parameter")
    other.load_state_dict(own.state_dict())
    assert torch.equal(flat(other.solve(V)), flat(own.solve(V)))
    auto = own.solve(V, "auto")
    for block, columns in own.blocks.items():
        size = sum(V[name][0][..., at].numel() for name, at in columns.items())
        mean = float(own._mean_eigenvalue(block))
        trace = sum(float(F[i, i]) for i in _positions(model, columns))
        assert mean == pytest.approx(trace / size)
        for name, at in columns.items():
            assert_near(auto[name][..., at], own.solve(V, 0.1 * mean)[name][..., at])


def _positions(model: Any, columns: dict[str, slice]) -> list[int]:
    found, start = [], 0
    for name, layer in model.layers.items():
        O, I = layer.shape
        if name in columns:
            own = columns[name]
            found += [start + o * I + i for o in range(O) for i in range(own.start, own.stop)]
        start += O * I
    return found
