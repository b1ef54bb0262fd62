"""What loaders and callers of the first-order calculator may do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense_problem import DAMPING, Dense, everything
from ihvp import EKFACIHVP, FirstOrderInfluenceCalculator, InfluenceModel
from nets import assert_near, batches, plain
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


def test_an_unfitted_curvature_is_fitted_with_the_training_data() -> None:
    data = plain()
    model = data.model()
    train = batches(data.train, 8)
    curvature = EKFACIHVP(model, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(model, train, curvature)
    assert curvature.is_fitted
    fitted = FirstOrderInfluenceCalculator(model, None, EKFACIHVP(model, train, damping=DAMPING))
    assert torch.equal(calculator.scores(data.tests), fitted.scores(data.tests, train))


def test_a_fitted_curvature_is_not_fitted_again() -> None:
    data = plain()
    model = data.model()
    curvature = EKFACIHVP(model, data.tests, damping=DAMPING)
    before = curvature.evals
    FirstOrderInfluenceCalculator(model, batches(data.train, 8), curvature)
    assert all(curvature.evals[name] is x for name, x in before.items())


def test_another_loader_may_be_given_to_each_call() -> None:
    dense = Dense("plain", "ekfac")
    few = dense.train[2:]
    assert_near(dense.calculator.scores(dense.data.tests, few), dense.scores[:, 16:])
    assert_near(dense.calculator.self_scores(few), dense.self_scores[16:])
    indices = torch.cat([found for _, _, found in dense.calculator.top_k(dense.data.tests, few, k=2)])
    assert torch.equal(indices, dense.scores[:, 16:].topk(2).indices)


class Stream(IterableDataset):
    """Data without a length."""

    def __init__(self, data: TensorDataset) -> None:
        super().__init__()
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


def test_a_data_loader_of_a_stream() -> None:
    dense = Dense("plain", "ekfac")
    stream = Stream(TensorDataset(dense.data.train.args[0], dense.data.train.targets))
    loader = DataLoader(stream, batch_size=10)
    curvature = EKFACIHVP(dense.model, loader, damping=DAMPING)
    calculator = FirstOrderInfluenceCalculator(dense.model, loader, curvature)
    assert_near(calculator.scores(dense.data.tests), dense.scores)


@pytest.mark.parametrize("caller", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", ["identity", "fisher", "kfac pi", "ekfac"])
def test_caller_may_have_switched_gradients_off(method: str, caller: Callable[[], Any]) -> None:
    dense = Dense("tokens", method, normalize="theta")
    want = everything(dense.calculator, dense.data)
    with caller():
        got = everything(dense.calculator, dense.data)
    for name, value in want.items():
        assert_near(got[name], value)


def test_nothing_is_left_on_the_net() -> None:
    dense = Dense("pooled", "ekfac", normalize="loss")
    dense.data.net.train()
    everything(dense.calculator, dense.data)
    assert dense.data.net.training
    for module in dense.data.net.modules():
        assert not module._forward_hooks and not module._backward_hooks
    assert all(p.grad is None and p.requires_grad for p in dense.data.net.parameters())


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar_can_be_switched(progress: bool, capsys: pytest.CaptureFixture[str]) -> None:
    data = plain()
    model = InfluenceModel(data.net, data.loss_fn, progress=progress)
    FirstOrderInfluenceCalculator(model, [data.train], EKFACIHVP(model, [data.train])).scores(data.tests)
    out, err = capsys.readouterr()
    assert out == "" and bool(err) == progress
    assert all(pass_ in err for pass_ in ("covariances", "eigenvalues", "queries", "scores")) == progress
