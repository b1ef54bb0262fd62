"""Tokens kept between passes: the same numbers, fewer runs of the net, nothing stale, nothing over the budget."""

from __future__ import annotations

from typing import Any

import ihvp
import pytest
import torch
from ihvp.capture import capture
from nets import cross_entropy
from torch import Tensor, nn


class Counted(nn.Module):
    """Counts its runs; has a buffer and a layer that two others share their input with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3, bias=False)
        self.register_buffer("scale", torch.ones(3))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        hidden = torch.tanh(self.first(x))
        return (self.left(hidden) + self.right(hidden)) * self.scale


def setting(cache_bytes: int) -> tuple[ihvp.InfluenceModel, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)]
    return ihvp.InfluenceModel(Counted(), cross_entropy, cache_bytes=cache_bytes, progress=False), data


def scored(model: ihvp.InfluenceModel, data: list[Any]) -> Tensor:
    curvature = ihvp.EKFACIHVP(model, data, damping=0.1)
    return ihvp.FirstOrderInfluenceCalculator(model, data, curvature).scores(data[:1])


def test_the_net_runs_once_for_three_passes_and_the_bits_are_the_same() -> None:
    plain, data = setting(0)
    kept, _ = setting(1 << 20)
    assert torch.equal(scored(plain, data), scored(kept, data))
    assert plain.net.runs == 3 * 4 + 1 and kept.net.runs == 4  # the query is the first training batch


def test_the_budget_holds_and_what_does_not_fit_is_run_again() -> None:
    plain, data = setting(0)
    small, _ = setting(2 * 8 * 4 * (6 + 5 + 5 + 3 + 3 + 6 + 2) + 200)  # two batches and a little
    assert torch.equal(scored(plain, data), scored(small, data))
    assert small.cache is not None and 0 < small.cache.used <= small.cache.limit
    assert small.net.runs == 4 + 2 + 2


@pytest.mark.parametrize("change", ("parameter", "buffer", "mode"))
def test_a_changed_net_is_run_again(change: str) -> None:
    model, data = setting(1 << 20)
    scored(model, data)
    with torch.no_grad():
        if change == "parameter":
            model.net.left.weight.mul_(2)
        elif change == "buffer":
            model.net.scale.mul_(2)
        else:
            model.net.train(not model.net.training)
    fresh = ihvp.InfluenceModel(model.net, cross_entropy, progress=False)
    assert torch.equal(scored(fresh, data), scored(model, data))
    assert model.net.runs == 4 + 13 + 4


def test_batches_are_known_by_their_contents() -> None:
    model, data = setting(1 << 20)
    seen: list[Tensor] = []
    for x, y in (data[0], (data[0][0].clone(), data[0][1]), (data[0][0], 2 - data[0][1]), data[1]):
        capture(model, model.batch((x, y)), lambda layer, a, delta, mask: seen.append(delta))
    assert model.net.runs == 3
    assert all(torch.equal(x, y) for x, y in zip(seen[:3], seen[3:6], strict=True))
    assert not torch.equal(seen[0], seen[6])


def test_a_loader_that_uses_its_memory_again_gets_no_stale_tokens() -> None:
    model, data = setting(1 << 20)
    memory = data[0][0].clone()
    losses = []
    for x in (data[0][0], data[1][0]):
        memory.copy_(x)
        losses.append(capture(model, model.batch((memory, data[0][1])), lambda *_: None))
    assert model.net.runs == 2 and not torch.equal(*losses)


def test_sampled_targets_and_measurements_are_not_mixed_up_with_the_loss() -> None:
    model, data = setting(1 << 20)
    scored(model, data)
    runs = model.net.runs
    ihvp.EKFACIHVP(model, data, damping=0.1, fisher="sampled")
    assert model.net.runs == runs + 8
    capture(model, model.batch(data[0]), lambda *_: None, measurement=lambda outputs, targets: outputs.sum(1))
    assert model.net.runs == runs + 9


def test_clear_cache_forgets() -> None:
    model, data = setting(1 << 20)
    scored(model, data)
    model.net.left.weight.data.mul_(2)
    model.clear_cache()
    scored(model, data)
    assert model.net.runs == 8


@pytest.mark.parametrize("wrong", (-1, 1.5, True, "1 GB"))
def test_a_wrong_budget_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="cache_bytes must be a whole number >= 0"):
        setting(wrong)
