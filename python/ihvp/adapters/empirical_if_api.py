"""The signatures of the Empirical Influence Function implementation, over ihvp.

    IF = EmpiricalIF(dl_train=loader, model=net, param_filter_fn=lambda name, param: "fc" in name, criterion=loss)
    scores = IF.query_influence(test_input, test_target)          # (N,), one per training example

Signs, as its guide states them: EmpiricalIF and TracIn are positive when the example helps the query;
BaseInfluenceFunction is positive when keeping the example raises the query's loss. The loader must not shuffle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

import ihvp

ParamFilter = Callable[[str, nn.Parameter], bool]
Criterion = Callable[..., Tensor]
Checked = tuple[int, float, float]

CROSS_ENTROPY = nn.CrossEntropyLoss(reduction="none")


def _model(model: nn.Module, param_filter_fn: ParamFilter | None, criterion: Criterion) -> ihvp.InfluenceModel:
    """The layers of which the filter takes a parameter; without a filter all of them."""
    if param_filter_fn is None:
        return ihvp.InfluenceModel(model, criterion)
    taken: dict[str, set[bool]] = {}
    for name, p in model.named_parameters():
        taken.setdefault(name.rpartition(".")[0], set()).add(bool(param_filter_fn(name, p)))
    split = [name for name, answers in taken.items() if len(answers) == 2]
    if split:
        raise ValueError(f"param_filter_fn must take a layer's parameters all or none, it splits {split}")
    return ihvp.InfluenceModel(model, criterion, layers=[name for name, answers in taken.items() if True in answers])


class _Queries:
    """query_influence over a calculator."""

    calculator: Any

    def query_influence(self, query_input: Any, query_target: Any) -> Tensor:
        """(N,) scores for one query, given as a batch of 1."""
        scores: Tensor = self.calculator.scores([(query_input, query_target)])
        if len(scores) != 1:
            raise ValueError(f"query_input must be a batch of 1, got {len(scores)}")
        return scores[0]


class BaseInfluenceFunction(_Queries):
    """- g_query^T (H + damping I)^-1 g_n, H the mean Hessian (Koh and Liang 2017), without the factor 1/N.

    `ihvp_calculator` names the IHVP object in ihvp.METHODS that solves.
    """

    def __init__(
        self,
        dl_train: Iterable[Any],
        model: nn.Module,
        param_filter_fn: ParamFilter | None = None,
        criterion: Criterion = CROSS_ENTROPY,
        *,
        damping: float = 1e-3,
        ihvp_calculator: str = "cgd",
    ) -> None:
        own = _model(model, param_filter_fn, criterion)
        curvature = ihvp.make_ihvp(ihvp_calculator, own, dl_train, {"damping": damping})
        self.calculator = ihvp.FirstOrderInfluenceCalculator(own, dl_train, curvature, sign="loss_change")


class TracIn(_Queries):
    """g_query^T g_n, summed over checkpoints where they are given; without them at the model's own weights."""

    def __init__(
        self,
        dl_train: Iterable[Any],
        model: nn.Module,
        param_filter_fn: ParamFilter | None = None,
        criterion: Criterion = CROSS_ENTROPY,
        *,
        checkpoints: Sequence[Any] | None = None,
        learning_rates: float | Sequence[float] = 1.0,
    ) -> None:
        own = _model(model, param_filter_fn, criterion)
        states = [model.state_dict()] if checkpoints is None else checkpoints
        self.calculator = ihvp.TracInCalculator(own, dl_train, states, learning_rates)


class EmpiricalIF(_Queries):
    """(dL_q+ dL_n+ + dL_q- dL_n-) / 2 along one step of ascent and one of descent on the query's loss."""

    def __init__(
        self,
        dl_train: Iterable[Any],
        model: nn.Module,
        param_filter_fn: ParamFilter | None = None,
        criterion: Criterion = CROSS_ENTROPY,
        *,
        step: float = 0.1,
    ) -> None:
        self.calculator = ihvp.EmpiricalInfluence(_model(model, param_filter_fn, criterion), dl_train, step)

    def reverse_check(
        self,
        query_input: Any,
        query_target: Any,
        influence_values: Tensor | Sequence[float],
        check_ratio: float = 0.01,
    ) -> tuple[list[Checked], list[Checked]]:
        """(most, least): (index, score, reverse score) of the highest and the lowest scores."""
        calculator: ihvp.EmpiricalInfluence = self.calculator
        return calculator.reverse_check(query_input, query_target, influence_values, check_ratio)
