"""The first-order calculator's problem with the matrices that it must agree with."""

from __future__ import annotations

from typing import Any

import torch
from ihvp import FirstOrderInfluenceCalculator, Order
from nets import METHODS, PROBLEMS, Problem, batches, dense_scores, flat, gradients
from torch import Tensor

DAMPING = 0.3


class Dense:
    """A problem with its calculator and, from the definitions, the matrices that the calculator must agree with."""

    def __init__(self, problem: str | Problem, method: str, **options: Any) -> None:
        own = METHODS[method]
        self.data = PROBLEMS[problem]() if isinstance(problem, str) else problem
        self.model = self.data.model()
        self.train = batches(self.data.train, 8)  # the last is smaller
        self.damped = own.damped(self.model, self.data.train, DAMPING)
        self.g_train = flat(gradients(self.model, self.data.train))
        self.g_tests = [flat(gradients(self.model, batch)) for batch in self.data.tests]
        self.g_test = torch.cat(self.g_tests)
        curvature = own(self.model, self.train, damping=DAMPING)
        self.calculator = FirstOrderInfluenceCalculator(self.model, self.train, curvature, **options)

    @property
    def scores(self) -> Tensor:
        return dense_scores(self.damped, self.g_test, self.g_train)

    @property
    def self_scores(self) -> Tensor:
        return dense_scores(self.damped, self.g_train, self.g_train).diagonal()

    @property
    def norms(self) -> dict[Any, Tensor]:
        """What RelatIF divides by."""
        theta = torch.linalg.solve(self.damped, self.g_train.T).norm(dim=0)
        return {False: torch.ones(len(theta)), True: theta, "theta": theta, "loss": self.self_scores.sqrt()}


def everything(calculator: FirstOrderInfluenceCalculator, data: Problem) -> dict[str, Tensor]:
    train = calculator.train_loader
    tops = [list(calculator.top_k(data.tests, train, k=29, order=order)) for order in Order]
    in_batches = calculator.estimate_influence_values_in_batches(data.tests)
    return {
        "scores": calculator.scores(data.tests),
        "self_scores": calculator.self_scores(),
        "values": torch.cat([values for _, values in calculator.compute_influence_values()]),
        "in_batches": torch.cat([torch.cat([scores for _, scores in inner], dim=1) for _, inner in in_batches]),
        "group": torch.cat(list(calculator.estimate_influence_values_group([train], [data.tests]))),
        "top_k": torch.cat([torch.cat([values.sort(1).values for _, values, _ in found]) for found in tops]),
        "top_k_train": calculator.compute_top_k_from_training_dataset(k=29)[0].sort().values,
    }
