from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from ihvp import _native
from op_cases import ENGINES, ISAS, Engine

# The same examples in every run, and no verdict by the clock.
hypothesis.settings.register_profile("ihvp", derandomize=True, database=None, deadline=None, max_examples=40)
hypothesis.settings.load_profile("ihvp")


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Every test begins with the same seed, torch's default float32 precision, the best instruction set and one thread:
    most are too small to share."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    isa, threads = _native.isa(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    _native.use_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=ENGINES, ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """The test runs once on every implementation and instruction set present."""
    with request.param.running():
        yield request.param


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    """The test runs once on every instruction set that this processor has."""
    _native.use_isa(request.param)
    return request.param
