"""TracIn against the sum over checkpoints written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ihvp import FirstOrderInfluenceCalculator, IdentityIHVP, InfluenceModel, TracInCalculator
from nets import F64, PROBLEMS, Problem, assert_near, batches, chain, flat, gradients, plain
from torch import Tensor, nn

RATES = [0.5, 0.1, 2.0]


def checkpoints(net: nn.Module, count: int = 3) -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [
        {key: x + 0.3 * torch.randn_like(x) if x.is_floating_point() else x for key, x in net.state_dict().items()}
        for _ in range(count)
    ]


def naive(data: Problem, states: list[dict[str, Tensor]], rates: list[float]) -> tuple[Tensor, Tensor]:
    """(scores, self-influence): nets loaded one after the other, per-example gradients, a loop over the pairs."""
    model = data.model()
    before = {key: x.clone() for key, x in data.net.state_dict().items()}
    Q = sum(batch.size for batch in data.tests)
    scores, own = torch.zeros(Q, data.train.size, dtype=F64), torch.zeros(data.train.size, dtype=F64)
    for state, rate in zip(states, rates, strict=True):
        data.net.load_state_dict(state)
        g_test = torch.cat([flat(gradients(model, batch)) for batch in data.tests])
        g_train = flat(gradients(model, data.train))
        for n, g in enumerate(g_train):
            own[n] += rate * g @ g
            for q, query in enumerate(g_test):
                scores[q, n] += rate * query @ g
    data.net.load_state_dict(before)
    return scores, own


@pytest.mark.parametrize("name", PROBLEMS)
def test_scores(name: str) -> None:
    data = PROBLEMS[name]()
    states = checkpoints(data.net)
    scores, own = naive(data, states, RATES)
    calculator = TracInCalculator(data.model(), batches(data.train, 8), states, RATES)
    assert_near(calculator.scores(data.tests), scores)
    assert_near(calculator.self_scores(), own)
    found = list(calculator.top_k(data.tests, k=4))
    assert torch.equal(torch.cat([indices for _, _, indices in found]), scores.topk(4).indices)
    values, indices = calculator.compute_top_k_from_training_dataset(k=3)
    assert_near(values, own.topk(3).values)
    assert torch.equal(indices, own.topk(3).indices)
    blocks = list(calculator.estimate_influence_values_in_batches(data.tests))
    rebuilt = torch.cat([torch.cat([block for _, block in inner], dim=1) for _, inner in blocks])
    assert_near(rebuilt, scores)
    other = TracInCalculator(data.model(), batches(data.train, 8), states, RATES, sign="loss_change")
    assert_near(other.scores(data.tests), -scores)
    assert_near(other.self_scores(), -own)


def test_checkpoints_of_every_form(tmp_path: Path) -> None:
    data = plain()
    states = checkpoints(data.net)
    torch.save(states[1], tmp_path / "one.pt")
    torch.save(states[2], tmp_path / "two.pt")
    mixed: list[Any] = [lambda: states[0], tmp_path / "one.pt", str(tmp_path / "two.pt")]
    calculator = TracInCalculator(data.model(), [data.train], mixed, 0.1)
    assert_near(calculator.scores(data.tests), naive(data, states, [0.1] * 3)[0])


def test_the_last_layer_fast_form() -> None:
    data = plain()
    states = checkpoints(data.net)
    calculator = TracInCalculator(data.model(start_layer=-1), [data.train], states, RATES)
    model = data.model()
    want = torch.zeros(7, 29, dtype=F64)
    before = {key: x.clone() for key, x in data.net.state_dict().items()}
    for state, rate in zip(states, RATES, strict=True):
        data.net.load_state_dict(state)
        test = torch.cat([gradients(model, batch)["2"].flatten(1) for batch in data.tests])
        want += rate * test @ gradients(model, data.train)["2"].flatten(1).T
    data.net.load_state_dict(before)
    assert_near(calculator.scores(data.tests), want)


def test_one_checkpoint_is_the_first_order_influence_of_the_identity() -> None:
    data = plain()
    model = data.model()
    calculator = TracInCalculator(model, [data.train], [data.net.state_dict()])
    first = FirstOrderInfluenceCalculator(model, [data.train], IdentityIHVP(model))
    assert torch.equal(calculator.scores(data.tests), first.scores(data.tests))


def snapshot(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, int], dict[str, int]]:
    """Values, the tensors' addresses, and their version counters."""
    own = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return (
        {key: x.detach().clone() for key, x in own.items()},
        {key: x.data_ptr() for key, x in own.items()},
        {key: id(x) for key, x in own.items()},
    )


def assert_untouched(net: nn.Module, before: Any) -> None:
    after = snapshot(net)
    assert after[1:] == before[1:]
    assert all(torch.equal(x, before[0][key]) for key, x in after[0].items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(not module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_net_is_left_as_it_was(caller: Callable[[], Any]) -> None:
    data = plain()
    data.net.append(nn.BatchNorm1d(3, dtype=F64))
    data.net.eval()
    model = InfluenceModel(data.net, data.loss_fn, layers=[nn.Linear], progress=False)
    before = snapshot(data.net)
    with caller():
        calculator = TracInCalculator(model, [data.train], checkpoints(data.net))
        calculator.scores(data.tests)
        calculator.self_scores()
    assert_untouched(data.net, before)


def test_the_net_is_left_as_it_was_by_an_exception() -> None:
    """While the exception is still being handled, too."""
    data = plain()
    calls = [0]

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return data.loss_fn(outputs, targets)

    model = InfluenceModel(data.net, loss, progress=False)
    calculator = TracInCalculator(model, [data.train], checkpoints(data.net))
    before = snapshot(data.net)
    with pytest.raises(KeyboardInterrupt):
        try:
            calculator.scores(data.tests)
        except KeyboardInterrupt:
            assert_untouched(data.net, before)
            raise
    assert_untouched(data.net, before)


def test_tied_layers() -> None:
    torch.manual_seed(0)
    net = chain(4, 4, 4).double()
    net[2].weight = net[0].weight
    net[2].bias = net[0].bias
    data = plain()
    states = [{key: x + 0.1 for key, x in net.state_dict().items()}]
    model = InfluenceModel(net, data.loss_fn, progress=False)
    before = snapshot(net)
    scores = TracInCalculator(model, [data.train], states).scores(data.tests)
    assert_untouched(net, before)
    net.load_state_dict(states[0])
    want = FirstOrderInfluenceCalculator(model, [data.train], IdentityIHVP(model)).scores(data.tests)
    assert torch.equal(scores, want)


def changed(key: str, value: Tensor | None) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A state with another tensor under this name, or without it."""

    def change(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rest = {own: x for own, x in state.items() if own != key}
        return rest if value is None else {**rest, key: value}

    return change


ARCHITECTURES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a shape": (changed("0.weight", torch.zeros(3, 5)), r"checkpoint 1: '0.weight' must be \(3, 4\), got \(3, 5\)"),
    "a missing tensor": (changed("2.weight", None), "checkpoint 1 has no '2.weight'; it is of another architect"),
    "one too many": (changed("4.weight", torch.zeros(3)), "checkpoint 1 has '4.weight', which the net has not"),
    "no state": (lambda state: [1, 2], "checkpoint 1 must be a state_dict, a file of one or a function, got list"),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_checkpoints_of_another_architecture(case: str) -> None:
    change, match = ARCHITECTURES[case]
    data = plain()
    state = data.net.state_dict()
    with pytest.raises((ValueError, TypeError), match=match):
        TracInCalculator(data.model(), [data.train], [state, change(state)])


def test_wrong_arguments() -> None:
    data = plain()
    state = data.net.state_dict()
    with pytest.raises(ValueError, match="checkpoints must hold at least one"):
        TracInCalculator(data.model(), [data.train], [])
    with pytest.raises(ValueError, match="one for each of 2 checkpoints, got 3"):
        TracInCalculator(data.model(), [data.train], [state, state], RATES)
    with pytest.raises(FileNotFoundError):
        TracInCalculator(data.model(), [data.train], ["nowhere.pt"])
    with pytest.raises(ValueError, match="sign must be one of"):
        TracInCalculator(data.model(), [data.train], [state], sign="minus")
